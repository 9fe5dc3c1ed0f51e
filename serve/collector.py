"""The way of spans to a collector: OTLP over HTTP, in batches, by a thread of its own behind a bounded queue.

Nobody waits for a collector. While it takes no spans they are dropped, which is said once. OpenTelemetry's SDK is
imported by this module alone, which only a server that was asked for spans imports; the SDK reads its own variables of
the environment (OTEL_...): headers, TLS, limits, sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

import wan_runtime

log = logging.getLogger("wan_serve")
# Who says that spans are not delivered, again and again: the exporter, and the queue that overflows behind it.
COMPLAINERS = (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal")


class _Once(logging.Filter):
    """Makes one warning of the complaints about a collector, until it takes spans again."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.said = url, False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.said:
            self.said = True
            log.warning(
                "%s takes no spans, and they are dropped until it does: %s", self.url, record.getMessage()
            )
        return False

    def delivered(self) -> None:
        """The collector has taken spans."""
        if self.said:
            self.said = False
            log.info("%s takes spans again", self.url)


class _Exporter(SpanExporter):
    """OTLP's, noticing what is delivered."""

    def __init__(self, url: str) -> None:
        self._exporter, self._once = OTLPSpanExporter(url), _Once(url)
        for name in COMPLAINERS:
            logging.getLogger(name).addFilter(self._once)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._once.delivered()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def open_provider(url: str) -> TracerProvider:
    """What makes spans, and posts them to a collector at `url`.

    Raises ValueError or RuntimeError where OpenTelemetry cannot take what one of its variables in the environment says.
    """
    given = OTELResourceDetector().detect().attributes
    resource = Resource.create(
        {"service.name": "wan-serve", "service.version": wan_runtime.__version__, **given}
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # it would wait for 30 s
    provider.add_span_processor(BatchSpanProcessor(_Exporter(url)))
    return provider
