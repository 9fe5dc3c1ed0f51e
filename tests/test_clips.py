"""Clips of the tiny model show what was asked in every format, and do not once a file is misread.

A wrong scale, nibble or layout loads without any error, so nothing but what the model draws tells it from a right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wan_runtime
from tests.builders.writers import WRITERS
from tests.faults.trained import trained
from wan_runtime.checkpoint import open_checkpoint
from wan_runtime.dialects import DIALECTS
from wan_runtime.errors import CheckpointError
from wan_runtime.generating import Pipeline, generate
from wan_runtime.pipelines import load_pipeline
from wan_runtime.tiny import checker, drawing, sheet, variants, whole
from wan_runtime.tiny.drawing import Ask, Frames
from wan_runtime.tiny.train import scenes

STEPS = 3  # the fewest with margin: the checker accepts these clips from 2 steps on
ASKS = [
    Ask("a large red circle moving right on a white background", 7),
    Ask("a large yellow square moving up on a navy background", 7),
    Ask("a large green ring moving left on a black background", 7),
]
RIGHT = ("comfy-fp8-scaled", "modelopt-nvfp4")
MISREAD = ("fp8-scales-dropped", "nvfp4-nibbles-swapped", "nvfp4-scales-mislaid")
Drawing = Callable[[str], list[Frames]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains nothing on models this small, and costs much where something else runs too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def pipe(one_thread: None) -> Pipeline:
    return load_pipeline(device="cpu")


@pytest.fixture(scope="module")
def drawn(pipe: Pipeline, folder: Path) -> Drawing:
    """The clips of a variant, drawn once."""
    done: dict[str, list[Frames]] = {}

    def clips(name: str) -> list[Frames]:
        if name not in done:
            insisted = variants.VARIANTS[name].dialect
            pipe.transformer = loaded(variants.checkpoint(name, folder), insisted)
            done[name] = drawing.draw(pipe, ASKS, STEPS)
        return done[name]

    return clips


def loaded(file: Path, dialect: str | None = None) -> Any:
    return wan_runtime.load(file, device="cpu", dtype=torch.float32, dialect=dialect)


def apart(some: list[Frames], others: list[Frames]) -> float:
    """Mean absolute difference of two lists of clips, of 255."""
    return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(some, others, strict=True)]))


def wrong(clips: list[Frames]) -> list[tuple[str, ...]]:
    return [checker.wrong(clip, ask.prompt) for clip, ask in zip(clips, ASKS, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", *RIGHT])
def test_a_right_reading_draws_what_was_asked(name: str, drawn: Drawing) -> None:
    assert wrong(drawn(name)) == [()] * len(ASKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISREAD)
def test_a_misreading_does_not(name: str, drawn: Drawing) -> None:
    assert () not in wrong(drawn(name))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", WRITERS)
def test_every_dialect_draws_what_was_asked(dialect: str, pipe: Pipeline, tmp_path: Path) -> None:
    """From a file that our own writer makes where there is one, else from the tests' independent one."""
    file = tmp_path / "model.safetensors"
    target = next((t for t in DIALECTS[dialect].targets if t != "bf16"), None)
    if target is not None:
        wan_runtime.convert(variants.SOURCE, file, to=target)
    else:
        blocks = {key.split(".")[1] for key in load_file(variants.SOURCE) if key.startswith("blocks.")}
        trained(dialect, WRITERS[dialect][1][0], layers=len(blocks)).write(tmp_path)
    assert open_checkpoint(file).dialect.name == dialect
    pipe.transformer = loaded(file)
    [clip] = drawing.draw(pipe, ASKS[:1], STEPS)
    assert checker.wrong(clip, ASKS[0].prompt) == ()


@pytest.mark.parametrize("name", ["nvfp4-nibbles-swapped", "nvfp4-scales-mislaid"])
def test_a_misreading_is_refused_where_the_weights_contradict_the_marks(name: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its marks and its weights contradict.*--dialect modelopt"):
        loaded(variants.checkpoint(name, folder))


@pytest.mark.slow
def test_mislaid_scales_are_further_from_bf16_than_the_right_ones(drawn: Drawing) -> None:
    right, mislaid = drawn("modelopt-nvfp4"), drawn("nvfp4-scales-mislaid")
    assert apart(mislaid, drawn("bf16")) > 2 * apart(right, drawn("bf16"))


@pytest.mark.parametrize("name", RIGHT)
def test_both_namings_hold_the_same_weights(name: str, folder: Path) -> None:
    """The clips are then the same too: sampling knows nothing of a file's names."""
    original, renamed = (
        loaded(variants.checkpoint(name, folder, names)) for names in ("original", "diffusers")
    )
    assert variants.differences(original, renamed) == []
    assert len(original.state_dict()) > 100


def test_a_changed_weight_is_a_difference(folder: Path) -> None:
    one, other = (loaded(variants.checkpoint("comfy-fp8-scaled", folder)) for _ in range(2))
    name = next(name for name in one.state_dict() if name.endswith("bias"))
    with torch.no_grad():
        other.state_dict()[name].add_(1)
    assert variants.differences(one, other) == [name]


def test_the_whole_clip_decodes_as_the_vae_does(pipe: Pipeline) -> None:
    latent = torch.randn(1, 16, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = pipe.vae.decode(latent).sample
        at_once = whole.decode(pipe.vae, latent).clamp(-1, 1)
    torch.testing.assert_close(at_once, own, atol=1e-4, rtol=1e-4)


def test_the_whole_clip_encodes_as_the_vae_does(pipe: Pipeline) -> None:
    generator = torch.Generator().manual_seed(3)
    clip = scenes.render(scenes.sample(1, generator), generator, frames=9, resolution=64)
    with torch.no_grad():
        own = pipe.vae.encode(clip).latent_dist.mode()
        mean, _ = whole.encode(pipe.vae, clip)
    torch.testing.assert_close(mean, own, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_generate_draws_what_is_scored(pipe: Pipeline, drawn: Drawing) -> None:
    """`wan_runtime generate` and the server go through here: the figures hold for what a user gets."""
    clips = drawn("bf16")
    pipe.transformer = loaded(variants.SOURCE)
    ask = ASKS[0]
    profile = wan_runtime.generating.clip_profile(pipe)
    clip = generate(pipe, profile.request(ask.prompt, seed=ask.seed, num_inference_steps=STEPS))
    assert np.abs(clip.frames.astype(int) - clips[0]).max() <= 1


def test_asks_are_a_fixed_list() -> None:
    hundred = drawing.asks(100)
    assert drawing.asks(7) == hundred[:7]
    assert len({ask.prompt for ask in hundred}) == len({ask.seed for ask in hundred}) == 100
    with pytest.raises(ValueError, match="there are 1280 different prompts"):
        drawing.asks(0)


def test_a_frame_that_is_not_finite_shows_nothing(pipe: Pipeline) -> None:
    latent = torch.full((1, 16, 2, 16, 16), torch.nan)
    frames = drawing.decode(pipe, latent)[0]
    assert checker.read(frames).shape is None


def test_the_sheet_shows_every_clip() -> None:
    clips = [np.full((17, 128, 128, 3), value, np.uint8) for value in (10, 60)]
    picture = np.asarray(sheet.contact_sheet(["one", "two"], {"a": clips, "b": clips[::-1]}))
    for value in (10, 60):
        assert (picture == value).all(axis=-1).sum() >= 2 * 3 * 128 * 128
