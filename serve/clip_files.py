"""A finished file as an answer, whole or in ranges, with its refusals in the envelope like all others."""

from __future__ import annotations

from pathlib import Path

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from .guards import answer

REFUSALS = {
    400: ("invalid_range", "The Range header cannot be read: it must be such as bytes=0-1023."),
    416: ("range_not_satisfiable", "The Range header asks for bytes that the file has not."),
}


class ClipFile(FileResponse):
    """A file that is there. Raises FileNotFoundError at once where it is not, rather than when it is sent."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, media_type=kind, filename=path.name, stat_result=path.stat())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False

        async def send_in_the_envelope(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in REFUSALS:
                refused = True
                kept = {
                    name.decode(): value.decode()
                    for name, value in message["headers"]
                    if name == b"content-range"
                }
                await answer(send, message["status"], *REFUSALS[message["status"]], kept)
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, send_in_the_envelope)
