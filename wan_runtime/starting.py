"""The image that a clip starts from: decoded within bounds, and brought to the clip's size.

Images come from strangers. Only PNG, JPEG and WebP are read, whatever a name or a header says; the size stands in the
first bytes and is looked at before a pixel is decoded; what is damaged, animated or too large is refused.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wan_runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 2**26  # 67 million: the largest cameras' pictures, and 256 MiB while one is decoded


@dataclass(frozen=True)
class StartImage:
    """A picture in 8-bit RGB, upright, and the SHA-256 (hex) of the file that it came from."""

    picture: Image
    sha256: str


def open_image(source: Path | str | bytes) -> StartImage:
    """The image of a file, or of a file's content: PNG, JPEG or WebP, up to 32 MiB and 67 million pixels.

    It is turned as its EXIF data says; what is transparent is laid on white; colours are taken to be sRGB. Raises
    InvalidRequest (`invalid_image`) for anything else, and OSError for a file that cannot be read.
    """
    content = source if isinstance(source, bytes) else _read(Path(source))
    if len(content) > MAX_BYTES:
        raise _refused(f"has {len(content)} bytes or more; up to {MAX_BYTES} are taken")
    return StartImage(_decode(content), hashlib.sha256(content).hexdigest())


def fitted(image: StartImage, width: int, height: int) -> Image:
    """The picture at exactly `width` x `height` pixels: scaled until it covers them, then cropped around its middle.

    Nothing is stretched, and no border is added.
    """
    from PIL import Image, ImageOps

    if image.picture.size == (width, height):
        return image.picture
    return ImageOps.fit(image.picture, (width, height), Image.Resampling.LANCZOS)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _decode(content: bytes) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        # A warning is kept and written for each odd tag of an image's EXIF data, none of which is used but one.
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            warnings.simplefilter("ignore")
            _check(picture)
            picture.load()
            return _on_white(ImageOps.exif_transpose(picture))
    except InvalidRequest:
        raise
    except UnidentifiedImageError:
        raise _refused(f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Image.DecompressionBombError:  # Pillow's own bound is wider
        raise _refused(f"has too many pixels; up to {MAX_PIXELS} are decoded") from None
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise _refused(f"is damaged: {error}") from None


def _check(picture: Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _refused(f"has {width}x{height} pixels; up to {MAX_PIXELS} in all are decoded")
    if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
        raise _refused("is animated; a clip starts from one picture")
    if picture.mode.startswith(("I", "F")):
        raise _refused(
            f"has {picture.mode} pixels, more than 8 bits each in one channel; save it with 8 bits"
        )


def _on_white(picture: Image) -> Image:
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest("image", "invalid_image", f"The start image {why}.")
