"""The checker reads rendered clips right, and nothing else: it can say yes, and it can say no."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch

from wan_runtime.tiny import checker, words
from wan_runtime.tiny.train import scenes
from wan_runtime.tiny.words import Scene
from wan_runtime.video import write_video

Frames = npt.NDArray[np.uint8]
COUNT = 150


def rendered(count: int, seed: int) -> list[tuple[Scene, Frames]]:
    """Scenes and their clips, drawn by the code that drew the training data; uint8 [17, 128, 128, 3]."""
    generator = torch.Generator().manual_seed(seed)
    classes = scenes.sample(count, generator)
    pairs = []
    for row in classes:
        clip = scenes.render(row[None], generator)[0].permute(1, 2, 3, 0)
        frames: Frames = ((clip + 1) * 127.5).round().to(torch.uint8).numpy()
        pairs.append((words.named(row.tolist()), frames))
    return pairs


@pytest.fixture(scope="module")
def truth() -> list[tuple[Scene, Frames]]:
    return rendered(COUNT, 31)


@pytest.fixture(scope="module")
def shown(truth: list[tuple[Scene, Frames]]) -> list[Scene]:
    """What the checker reads in each clip of `truth`."""
    readings = [checker.read(frames) for _, frames in truth]
    return [Scene(*(getattr(reading, field) for field in Scene._fields)) for reading in readings]


def test_rendered_clips_are_right(truth: list[tuple[Scene, Frames]], shown: list[Scene]) -> None:
    right = sum(scene == read for (scene, _), read in zip(truth, shown, strict=True))
    assert right >= 0.99 * COUNT


def test_another_clip_s_prompt_is_wrong(truth: list[tuple[Scene, Frames]], shown: list[Scene]) -> None:
    others = [scene for scene, _ in truth[1:] + truth[:1]]
    told = [(scene, other, read) for (scene, _), other, read in zip(truth, others, shown, strict=True)]
    pairs = [(other, read) for scene, other, read in told if scene != other]
    assert len(pairs) > 0.9 * COUNT
    assert not [other for other, read in pairs if other == read]


@pytest.mark.parametrize("field", Scene._fields)
def test_one_wrong_word_is_found(truth: list[tuple[Scene, Frames]], field: str) -> None:
    names = list(words.CLASSES[Scene._fields.index(field)])
    for scene, frames in truth[:8]:
        other = names[(names.index(getattr(scene, field)) + 1) % len(names)]
        assert checker.wrong(frames, words.prompt(scene)) == ()
        assert checker.wrong(frames, words.prompt(scene._replace(**{field: other}))) == (field,)


def test_floats_read_as_bytes_do(truth: list[tuple[Scene, Frames]]) -> None:
    for scene, frames in truth[:3]:
        assert checker.wrong(frames.astype(np.float32) / 255, words.prompt(scene)) == ()


def test_h264_keeps_a_clip_right(truth: list[tuple[Scene, Frames]], tmp_path: Path) -> None:
    right = 0
    for scene, frames in truth[:25]:
        write_video(frames, tmp_path / "clip.mp4", fps=8)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        right += not checker.wrong(np.stack(decoded), words.prompt(scene))
    assert right >= 24


def still(frames: Frames) -> Frames:
    return np.repeat(frames[8:9], len(frames), axis=0)


def test_a_frozen_clip_does_not_move(truth: list[tuple[Scene, Frames]]) -> None:
    moving = [(scene, frames) for scene, frames in truth[:30] if scene.motion != "standing still"]
    for scene, frames in moving[:5]:
        assert checker.wrong(still(frames), words.prompt(scene)) == ("motion",)
        assert "motion" in checker.wrong(frames[::-1], words.prompt(scene))


@pytest.mark.parametrize("kind", ["noise", "soft noise", "black", "constant", "gray", "speck", "flicker"])
def test_what_shows_nothing_is_rejected(kind: str) -> None:
    random = np.random.default_rng(3)
    clip = np.zeros((17, 128, 128, 3), np.uint8)
    if kind == "noise":
        clip = random.integers(0, 256, clip.shape, dtype=np.uint8)
    elif kind == "soft noise":
        clip = random.integers(0, 256, (17, 8, 8, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    elif kind == "constant":
        clip[:] = (230, 25, 25)
    elif kind == "gray":
        clip[:] = 128
    elif kind == "speck":
        clip[:, 60:62, 60:62] = (230, 25, 25)
    elif kind == "flicker":
        clip[::2, 40:80, 40:80] = (230, 25, 25)
    reading = checker.read(clip)
    assert reading.shape is None and reading.color is None and reading.motion is None


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.zeros((17, 128, 128), np.uint8), r"\[17, 128, 128\]"),
        (np.zeros((17, 128, 128, 4), np.uint8), r"\[17, 128, 128, 4\]"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "floats in 0..1"),
        (np.full((2, 8, 8, 3), 255.0, np.float32), "floats in 0..1"),
    ],
)
def test_what_is_no_clip_is_an_error(clip: npt.NDArray[np.generic], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checker.read(clip)


def test_a_prompt_is_read_back_or_refused() -> None:
    for scene, _ in rendered(10, 5):
        assert words.parse(words.prompt(scene)) == scene
    with pytest.raises(ValueError, match=r"'a dog' is not a prompt .* circle/square/triangle/ring"):
        words.parse("a dog")
