"""Where spans are sent at a collector's address, and whether they could be, found out before anything is opened."""

from __future__ import annotations

import urllib.parse

PATH = "/v1/traces"  # which OTLP over HTTP adds to a collector's address


def traces_url(endpoint: str) -> str:
    """Where the collector at a base URL takes spans."""
    return endpoint.rstrip("/") + PATH


def refusal(endpoint: str) -> str | None:
    """Why not, or None: it is no base URL of a collector, or OpenTelemetry's SDK is not installed."""
    if wrong := _wrong(endpoint):
        return f"--otlp-endpoint is {endpoint!r}; {wrong}"
    try:
        from . import collector  # noqa: F401
    except ImportError as error:
        return (
            f"--otlp-endpoint needs OpenTelemetry's SDK and its OTLP exporter, which are not installed ({error}). "
            "Install them with `pip install 'wan-runtime[otel]'`."
        )
    return None


def _wrong(endpoint: str) -> str | None:
    try:
        url = urllib.parse.urlsplit(endpoint)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid or " " in endpoint or not endpoint.isprintable():
        return "it must be a collector's URL, such as http://localhost:4318."
    if "@" in url.netloc:
        return "it must hold no credentials: give OTEL_EXPORTER_OTLP_HEADERS in the environment."
    if url.query or url.fragment:
        return "it must have no ? and no #."
    if url.path.rstrip("/").endswith(PATH):
        return f"{PATH} is added to it, so leave that out."
    return None
