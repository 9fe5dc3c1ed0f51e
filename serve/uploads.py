"""The body of a create, read within bounds: how large one may be, and how much of all of them is held at once.

What is small is read where the request stands. What is large is counted against a sum for the whole process, so that
many uploads at once are refused before they take its memory, and is decoded in a thread, one at a time, so that nobody
else waits for it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import anyio
from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from .errors import ApiError
from .lora_fields import LISTS
from .references import FIELD

MAX_BODY = 48 * 2**20  # bytes; room for the largest image as a data URL, which is a third longer
MAX_FIELDS = 64  # of a form
MAX_FILES = 2  # of a form: one is used, and of two it can be said that they are
MAX_PERCENT = 2**20  # signs in a plain form, slashes aside: more than the largest image's data URL has
MAX_JSON_VALUES = 10_000  # no create has so many, and each takes many times the memory of its text
MAX_HELD = 8 * MAX_BODY  # bytes, of all bodies together
SMALL = 64 * 1024  # bytes; of each body, these are not counted: creates without an image always find room
MULTIPART, PLAIN_FORM, JSON = "multipart/form-data", "application/x-www-form-urlencoded", "application/json"
CHARSET = re.compile(r"charset", re.IGNORECASE)
UTF_8 = re.compile(r';\s*charset\s*=\s*"?utf-?8"?\s*(?=;|$)', re.IGNORECASE)
Count = Callable[[int], None]
T = TypeVar("T")


class Uploads:
    """What all requests hold of their bodies. For the event loop alone."""

    def __init__(self, most: int = MAX_HELD) -> None:
        self.held, self._most = 0, most
        self._decoding = anyio.CapacityLimiter(1)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Count]:
        """Counts one request's bytes as they come, and until the block ends.

        What is yielded raises ApiError: 413 where the body is too large, 503 where all of them together are.
        """
        size = mine = 0

        def count(more: int) -> None:
            nonlocal size, mine
            size += more
            if size > MAX_BODY:
                raise ApiError(
                    413, "request_too_large", f"The body is larger than {MAX_BODY} bytes.", headers=CLOSE
                )
            grown = max(size - SMALL, 0) - mine
            if self.held + grown > self._most:
                message = (
                    f"{self.held} bytes of uploads are being worked on, and {self._most} are what this server "
                    "holds. Try again in a few seconds."
                )
                raise ApiError(503, "too_many_uploads", message, headers={"Retry-After": "5", **CLOSE})
            self.held, mine = self.held + grown, mine + grown

        try:
            yield count
        finally:
            self.held -= mine

    async def decoded(self, size: int, decode: Callable[[], T]) -> T:
        """What `decode` makes of a body of `size` bytes: at once if it is small, else in a thread."""
        return decode() if size <= SMALL else await anyio.to_thread.run_sync(decode, limiter=self._decoding)


CLOSE = {"connection": "close"}  # or the rest of the body would still be read, only to be dropped


async def read_whole(request: Request, count: Count) -> bytes:
    """A body, not decoded yet."""
    body = bytearray()
    async for chunk in request.stream():
        count(len(chunk))
        body += chunk
    return bytes(body)


def json_fields(body: bytes) -> dict[str, Any]:
    """The members of a JSON object that are not null. Raises ApiError 400."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ApiError(400, "invalid_json", f"The body holds more than {MAX_JSON_VALUES} values.")
    try:
        fields = json.loads(body, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError(
            400, "invalid_json", f"The body must be a JSON object; it is a {type(fields).__name__}."
        )
    return {name: value for name, value in fields.items() if value is not None}


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose members comes twice: nobody could say which of the two was meant."""
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise twice(name)
        if any("\ud800" <= character <= "\udfff" for character in name[:80]):
            raise ApiError(400, "invalid_json", "A member's name holds half a character (a lone surrogate).")
        members[name] = value
    return members


def plain_fields(body: bytes) -> dict[str, Any]:
    """The fields of a plain form. Raises ApiError 400."""
    body = body.replace(b"%2F", b"/").replace(
        b"%2f", b"/"
    )  # half of the signs in a data URL, for nearly nothing
    if body.count(b"%") > MAX_PERCENT:
        raise ApiError(400, "invalid_form", f"The form holds more than {MAX_PERCENT} percent signs.")
    try:
        return _collected(
            parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
        )
    except ValueError as error:
        raise ApiError(400, "invalid_form", f"The form cannot be read: {error}.") from None


async def read_multipart(request: Request, count: Count) -> tuple[dict[str, Any], int]:
    """The fields of a multipart form, files as their content, and the bytes of the body.

    Raises ApiError 400 for one that cannot be read.
    """
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        count(len(message.get("body", b"")))
        return message

    async with _form(Request(request.scope, counted)) as form:
        items: list[tuple[str, str | bytes]] = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name != FIELD:
                message = f"{name[:80]} was sent as a file."
                raise ApiError(422, f"invalid_{name[:80]}", message, param=name[:80])
            items.append((name, await value.read() if isinstance(value, UploadFile) else value))
    return _collected(items), size


def _collected(items: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """A form's fields by name; those of a list gathered, others refused where they come twice."""
    fields: dict[str, Any] = {}
    for name, value in items:
        if name in LISTS and isinstance(value, str):
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise twice(name)
        else:
            fields[name] = value
    return fields


@contextlib.asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_BODY) as form:
            yield form
    except (MultiPartException, HTTPException) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", error)
        raise ApiError(400, "invalid_form", f"The form cannot be read: {detail}") from None


def check_charset(kind: str) -> None:
    """Raises ApiError 400 for a form that is not in UTF-8.

    Other encodings are not decoded: some of Python's take the square of the text's length, or fail in odd ways.
    """
    if CHARSET.search(kind) and len(CHARSET.findall(kind)) != len(UTF_8.findall(kind)):
        raise ApiError(400, "invalid_form", "The form is in another charset than UTF-8.")


def twice(name: str) -> ApiError:
    """A field came twice."""
    return ApiError(400, "duplicate_parameter", f"{name[:80]} was sent twice.", param=name[:80])
