"""The page at `/`: a client of the API that needs no build step and asks nobody else for anything.

Its files are those of `web/`, read once; a request can only name one of them. Their policy allows scripts and styles of
this server and no inline ones, and no string ever becomes markup or code (Trusted Types, of which the page makes none).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from ..errors import ApiError
from . import Endpoint

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Page:
    """One file of the page: its bytes, their media type, and a tag that changes with them."""

    body: bytes
    kind: str
    tag: str


def _pages() -> dict[str, Page]:
    pages = {}
    for file in files("wan_runtime.serve").joinpath("web").iterdir():
        kind = KINDS.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            body = file.read_bytes()
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            pages[file.name] = Page(body, f"{kind}; charset=utf-8", tag)
    return pages


PAGES = _pages()


@router.get("/")
async def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, PAGES["index.html"])


@router.get("/web/{name}")
async def part(request: Request, name: str) -> Response:
    """A part of the page, by its name."""
    if name not in PAGES:
        raise ApiError(404, "unknown_url", "There is no such part of the page.")
    return _answer(request, PAGES[name])


def _answer(request: Request, page: Page) -> Response:
    headers = {"etag": page.tag, "cache-control": "no-cache", "content-security-policy": POLICY}
    if request.headers.get("if-none-match") == page.tag:
        return Response(status_code=304, headers=headers)
    return Response(page.body, media_type=page.kind, headers=headers)


ENDPOINT = Endpoint(router, public=True)
