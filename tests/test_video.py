"""What is written is what every player shows: checked by decoding it, and by reading the container's own boxes."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from wan_runtime.errors import InvalidOption
from wan_runtime.video import write_video

COLOURS = ((220, 30, 30), (30, 200, 40), (20, 40, 220), (230, 220, 30))


def clip(frames: int = 9) -> NDArray[np.uint8]:
    """Four columns of strong colour, and a white square that moves over them."""
    picture = np.zeros((frames, 64, 128, 3), np.uint8)
    for place, colour in enumerate(COLOURS):
        picture[:, :, place * 32 : place * 32 + 32] = colour
    for time in range(frames):
        picture[time, 20:40, time * 8 : time * 8 + 20] = 250
    return picture


def boxes(data: bytes) -> list[str]:
    """The names of an MP4's top-level boxes, in order."""
    found, place = [], 0
    while place < len(data):
        size, name = struct.unpack(">I4s", data[place : place + 8])
        found.append(name.decode())
        place += size
    return found


def test_the_frames_come_back_in_their_colours(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(clip(), path, 8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (8, 9)
        assert stream.codec_context.colorspace == 1  # BT.709, as tagged: an untagged file is anybody's guess
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    middle = read[0, 50, 16::32].astype(int)
    assert np.abs(middle - np.array(COLOURS)).max() <= 6
    noise = np.mean((read.astype(float) - clip()) ** 2)
    assert 10 * np.log10(255**2 / noise) > 35


def test_the_index_is_at_the_front_and_the_tags_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(clip(), path, 8, {"comment": "seed 7", "title": "a square"})
    names = boxes(path.read_bytes())
    assert names.index("moov") < names.index("mdat")
    with av.open(str(path)) as container:
        assert (container.metadata["comment"], container.metadata["title"]) == ("seed 7", "a square")


def test_an_older_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    write_video(clip(), path, 8)
    assert path.read_bytes()[4:8] == b"ftyp"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_older_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_video(clip(), path, 8)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((3, 16, 16, 3), np.float32),
        np.zeros((3, 16, 16), np.uint8),
        np.zeros((3, 15, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((3, 16, 16, 4), np.uint8),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    with pytest.raises(InvalidOption, match="uint8 frames"):
        write_video(frames, tmp_path / "clip.mp4", 8)
    assert list(tmp_path.iterdir()) == []


def test_a_rate_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="fps"):
        write_video(clip(), tmp_path / "clip.mp4", 0)
