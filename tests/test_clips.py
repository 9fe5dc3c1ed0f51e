"""Clips of the tiny model show what was asked in every format, and do not once a file is misread.

A wrong scale, nibble or layout loads without any error, so nothing but what the model draws tells it from a right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wan_runtime
from tests.builders.writers import EVERY
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
# Without its scales the FP8 file draws, at 3 steps, a red blob that passes for the second; of 30 other prompts none.
ASKS = [
    Ask("a large yellow square moving up on a navy background", 7),
    Ask("a large red circle moving right on a white background", 7),
]
RIGHT = ("comfy-fp8-scaled", "modelopt-nvfp4")
MISREAD = ("fp8-scales-dropped", "nvfp4-nibbles-swapped", "nvfp4-scales-mislaid")


class Drawing(Protocol):
    def __call__(self, file: Path, dialect: str | None = None, count: int = 2) -> list[Frames]: ...


Variants = Callable[[str], list[Frames]]


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
def draw(pipe: Pipeline) -> Drawing:
    """The clip of each ask from a file, drawn when it is taken; files that hold the same weights share theirs.

    Sampling knows nothing of a file but the model that it was loaded into, and half the dialects' FP8 is the same.
    """
    done: dict[str, list[Frames]] = {}

    def clips(file: Path, dialect: str | None = None, count: int = 2) -> list[Frames]:
        model = loaded(file, dialect)
        have = done.setdefault(digest(model), [])
        if len(have) < count:
            pipe.transformer = model
            have += drawing.draw(pipe, ASKS[len(have) : count], STEPS)
        return have[:count]

    return clips


@pytest.fixture(scope="module")
def drawn(draw: Drawing, folder: Path) -> Variants:
    """The clips of a variant, of a misreading the first alone: `make clips` draws them all."""

    def clips(name: str) -> list[Frames]:
        file, dialect = variants.checkpoint(name, folder), variants.VARIANTS[name].dialect
        return draw(file, dialect, count=1 if name in MISREAD else len(ASKS))

    return clips


def digest(model: torch.nn.Module) -> str:
    """Of every tensor of a model: its name, shape, dtype and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def loaded(file: Path, dialect: str | None = None) -> Any:
    return wan_runtime.load(file, device="cpu", dtype=torch.float32, dialect=dialect)


def apart(some: list[Frames], others: list[Frames]) -> float:
    """Mean absolute difference of two lists of clips, of 255."""
    return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(some, others, strict=True)]))


def wrong(clips: list[Frames]) -> list[tuple[str, ...]]:
    return [checker.wrong(clip, ask.prompt) for clip, ask in zip(clips, ASKS, strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", *RIGHT])
def test_a_right_reading_draws_what_was_asked(name: str, drawn: Variants) -> None:
    assert wrong(drawn(name)) == [()] * len(ASKS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* its weights contradict that:RuntimeWarning")
@pytest.mark.parametrize("name", MISREAD)
def test_a_misreading_does_not(name: str, drawn: Variants) -> None:
    assert () not in wrong(drawn(name))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", EVERY)
def test_every_dialect_draws_what_was_asked(dialect: str, draw: Drawing, tmp_path: Path) -> None:
    """From a file that our own writer makes where there is one, else from the tests' independent one."""
    target = next((t for t in DIALECTS[dialect].targets if t != "bf16"), None)
    if target is not None:
        file = tmp_path / "model.safetensors"
        wan_runtime.convert(variants.SOURCE, file, to=target)
    else:
        blocks = {key.split(".")[1] for key in load_file(variants.SOURCE) if key.startswith("blocks.")}
        file = trained(dialect, EVERY[dialect][1][0], layers=len(blocks)).write(tmp_path)
    assert open_checkpoint(file).dialect.name == dialect
    [clip] = draw(file, count=1)
    assert checker.wrong(clip, ASKS[0].prompt) == ()


def test_every_dialect_is_drawn() -> None:
    assert set(EVERY) == set(DIALECTS)


def test_only_the_same_weights_share_their_clips(folder: Path) -> None:
    one, same, other = (
        loaded(variants.checkpoint("comfy-fp8-scaled", folder, names))
        for names in ("original", "diffusers", "original")
    )
    assert digest(one) == digest(same)
    with torch.no_grad():
        next(t for name, t in other.state_dict().items() if name.endswith("bias"))[0] += 1
    assert digest(one) != digest(other)


CONTRADICT = r"its marks and its weights contradict.*--dialect modelopt"
LOST = r"its values reach 448, and no WAN model's go beyond 40.*its scales were lost.*--dialect plain"


@pytest.mark.parametrize(("name", "words"), list(zip(MISREAD, (LOST, CONTRADICT, CONTRADICT), strict=True)))
def test_a_misreading_is_refused_unless_it_is_insisted_on(name: str, words: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        loaded(variants.checkpoint(name, folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* its weights contradict that:RuntimeWarning")
def test_mislaid_scales_are_further_from_bf16_than_the_right_ones(drawn: Variants) -> None:
    right, mislaid, bf16 = (drawn(name)[:1] for name in ("modelopt-nvfp4", "nvfp4-scales-mislaid", "bf16"))
    assert apart(mislaid, bf16) > 2 * apart(right, bf16)


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
def test_generate_draws_what_is_scored(pipe: Pipeline, drawn: Variants) -> None:
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
