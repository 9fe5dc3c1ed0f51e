"""Frames to a file that every player opens: H.264 in MP4, 4:2:0, BT.709, its index at the front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wan_runtime.aside import written_aside
from wan_runtime.errors import InvalidOption

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CRF = 16  # x264's constant quality; below about 18 the loss is hard to see, also at small sizes


def write_video(
    frames: NDArray[np.uint8], path: Path | str, fps: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `frames`, uint8 [F, H, W, 3] in RGB with even H and W, as an H.264 MP4 at `path`.

    The file is written beside `path` and renamed onto it once it is on the disk, so that nobody reads half a clip;
    on any failure nothing is left and an older file stays. `metadata` are the container's tags (title, comment, ...).
    Raises InvalidOption for frames of another kind.
    """
    shape = tuple(frames.shape)
    if (
        frames.dtype != "uint8"
        or len(shape) != 4
        or shape[3] != 3
        or 0 in shape
        or shape[1] % 2
        or shape[2] % 2
    ):
        raise InvalidOption(
            f"A clip is uint8 frames [F, H, W, 3] with even height and width; these are {frames.dtype} {list(shape)}."
        )
    if fps < 1:
        raise InvalidOption(f"fps is {fps}; it must be at least 1.")
    path = Path(path)
    with written_aside(path) as aside:
        _encode(frames, aside, fps, metadata or {})


def _encode(frames: NDArray[np.uint8], path: Path, fps: int, metadata: Mapping[str, str]) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        container.metadata.update(metadata)
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(CRF), "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # untagged files are read as BT.601 or BT.709 by their size, and the colours shift between players
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        stream.codec_context.color_primaries, stream.codec_context.color_trc = 1, 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
