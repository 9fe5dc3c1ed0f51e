"""From what a client sent for a start image to what the worker needs: a PNG of the clip's size, kept beside the job.

The image is decoded before the job is taken in, so that a bad one is refused and never fails a job. Nothing of the
client's file is kept but the pixels: no name, no EXIF data, no place.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, replace

import anyio

from wan_runtime import ClipRequest, InvalidRequest, fitted, open_image

from .errors import ApiError
from .fetching import AT_ONCE, Fetcher
from .references import Reference


@dataclass(frozen=True)
class Intake:
    """Where start images pass through, few at a time: one that is decoded may take 256 MiB."""

    fetcher: Fetcher | None
    fetching: anyio.CapacityLimiter
    decoding: anyio.CapacityLimiter

    async def take(self, reference: Reference, clip: ClipRequest) -> tuple[ClipRequest, bytes]:
        """The clip with its image's digest, and the image as a PNG of the clip's size. Raises ApiError 422."""
        content = reference if isinstance(reference, bytes) else await self._fetched(reference)
        prepare = functools.partial(_prepared, content, clip)
        try:
            return await anyio.to_thread.run_sync(prepare, limiter=self.decoding)
        except InvalidRequest as error:
            raise refusal(error) from None

    async def _fetched(self, url: str) -> bytes:
        if self.fetcher is None:
            message = (
                "This server fetches no images from elsewhere. Send the image as a file, or as a data URL "
                "(data:image/png;base64,...)."
            )
            raise ApiError(422, "image_url_refused", message, param="input_reference")
        async with self.fetching:
            return await self.fetcher.fetch(url)


def open_intake(hosts: tuple[str, ...]) -> Intake:
    """An intake that fetches from these hosts, or from none."""
    fetcher = Fetcher(frozenset(host.lower() for host in hosts)) if hosts else None
    return Intake(fetcher, anyio.CapacityLimiter(AT_ONCE), anyio.CapacityLimiter(1))


def refusal(error: InvalidRequest) -> ApiError:
    """What the library says of an image, in the words of this API."""
    return ApiError(422, error.code.replace("image", "input_reference"), str(error), param="input_reference")


def _prepared(content: bytes, clip: ClipRequest) -> tuple[ClipRequest, bytes]:
    image = open_image(content)
    out = io.BytesIO()
    fitted(image, clip.width, clip.height).save(out, "PNG", compress_level=1)
    return replace(clip, image=image.sha256), out.getvalue()
