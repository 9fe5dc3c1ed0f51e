"""Start images: three formats, bounded before they are decoded, upright, and cropped to the clip's size."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wan_runtime.errors import InvalidRequest
from wan_runtime.starting import MAX_BYTES, MAX_PIXELS, fitted, open_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    return picture


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit RGB that says it is so large, with these chunks after its header."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_read_whatever_their_name(kind: str, tmp_path: Path) -> None:
    content = saved(halves(), kind)
    path = tmp_path / "picture.txt"
    path.write_bytes(content)
    for image in (open_image(content), open_image(path), open_image(str(path))):
        assert image.sha256 == hashlib.sha256(content).hexdigest()
        assert (image.picture.mode, image.picture.size) == ("RGB", (40, 20))
        assert np.abs(np.asarray(image.picture, int)[10, [5, 35]] - [RED, BLUE]).max() < 12


def test_a_photograph_is_turned_as_the_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    picture = open_image(saved(halves(), "JPEG", exif=exif, quality=95)).picture
    assert picture.size == (20, 40)
    assert np.abs(np.asarray(picture, int)[[5, 35], 10] - [RED, BLUE]).max() < 30


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture = open_image(saved(clear.convert(mode), "PNG")).picture
    assert picture.getpixel((6, 4)) == WHITE and picture.getpixel((2, 4)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_pixels_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    picture = open_image(saved(Image.new("RGB", (8, 8), WHITE).convert(mode), kind)).picture
    assert picture.mode == "RGB" and min(picture.getpixel((4, 4))) > 250  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((40, 20), (20, 20)), ((40, 20), (80, 40)), ((40, 20), (20, 40)), ((33, 17), (64, 32))],
)
def test_a_picture_covers_the_clip_and_is_cropped_around_its_middle(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    made = np.asarray(fitted(open_image(saved(halves(size), "PNG")), *wanted), int)
    width, height = wanted
    assert made.shape == (height, width, 3)
    assert (made[height // 2, 1] == RED).all() and (made[height // 2, -2] == BLUE).all()
    reds = (made[height // 2, :, 0] > 127).sum()
    assert abs(reds - width / 2) <= 1 + width / size[0]  # the middle stays in the middle


def test_what_is_cropped_is_what_sticks_out() -> None:
    framed = Image.new("RGB", (60, 20), (0, 255, 0))
    framed.paste(RED, (20, 0, 40, 20))
    assert {colour for _, colour in fitted(open_image(saved(framed, "PNG")), 20, 20).getcolors() or ()} == {
        RED
    }


HUGE = 30_000
REFUSED = {
    "nothing": (b"", "is no PNG"),
    "a text": (b"hello", "is no PNG"),
    "a GIF": (saved(halves(), "GIF"), "is no PNG"),
    "a BMP": (saved(halves(), "BMP"), "is no PNG"),
    "a TIFF": (saved(halves(), "TIFF"), "is no PNG"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no PNG"),
    "a PostScript file": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no PNG"),
    "half a PNG": (saved(Image.effect_noise((64, 64), 90).convert("RGB"), "PNG")[:2000], "is damaged"),
    "half a JPEG": (saved(Image.effect_noise((64, 64), 90), "JPEG")[:1000], "is damaged"),
    "half a WebP": (saved(halves(), "WEBP")[:30], "is"),
    "a PNG with a wrong checksum": (saved(halves(), "PNG").replace(b"IDAT", b"IDAT\1", 1), "is damaged"),
    "a bomb": (png(HUGE, HUGE, (b"IDAT", zlib.compress(b"\0" * 2**20))), "pixels"),
    "a bomb just above the bound": (png(8192, MAX_PIXELS // 8192 + 1, (b"IDAT", b"")), "8192x8193 pixels"),
    "a bomb of text": (png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**27))), "is damaged"),
    "a bomb of a profile": (png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 2**27))), "is damaged"),
    "an animated WebP": (saved(halves(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 20))]),
                         "is animated"),
    "an animated PNG": (saved(halves(), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 20))]),
                        "is animated"),
    "16 bits of grey": (saved(Image.new("I;16", (8, 8), 40_000), "PNG"), "more than 8 bits"),
    "too many bytes": (saved(halves(), "PNG") + b"\0" * MAX_BYTES, str(MAX_BYTES)),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_anything_else_is_refused_with_the_reason(what: str) -> None:
    content, why = REFUSED[what]
    with pytest.raises(InvalidRequest, match=why) as refused:
        open_image(content)
    assert (refused.value.param, refused.value.code) == ("image", "invalid_image")


def test_odd_metadata_fills_no_log() -> None:
    """Each of 3,000 tags that point beyond the file is a warning of its own, whose text Python keeps for ever."""
    tags = b"".join(struct.pack("<HHII", 1000 + n, 7, 2**20 + n, 8) for n in range(3000))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 3000) + tags + bytes(4)
    content = png(8, 8, (b"eXIf", exif), (b"IDAT", zlib.compress(bytes(8 * 25))))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert open_image(content).picture.size == (8, 8)
    assert told == []


PROBE = """
import resource, sys
from wan_runtime.errors import InvalidRequest
from wan_runtime.starting import open_image
from PIL import Image
Image.preinit(), Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for content in sys.stdin.buffer.read().split(b"=====")[:-1]:
    try:
        open_image(content)
    except InvalidRequest:
        continue
    sys.exit("it was taken")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_is_refused_before_its_memory_is_spent() -> None:
    """Measured in a process of its own: the pixels would take 2.7 GB, the text and the profile 128 MiB each."""
    webp = bytearray(saved(halves(), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 20))]))
    webp[24:30] = (16_382).to_bytes(3, "little") * 2  # what it says its canvas is
    bombs = [bytes(webp), *(content for what, (content, _) in REFUSED.items() if "bomb" in what)]
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=b"".join(bomb + b"=====" for bomb in bombs), capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 60 * 1024  # KiB
