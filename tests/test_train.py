"""The tiny model's training runs from end to end, and leaves what a machine that is gone afterwards must leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan_runtime.tiny import path
from wan_runtime.tiny.train import decoder, parts, scenes, start, vae

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = [
    "--vae-seconds=1", "--transformer-seconds=1", "--resolution=32", "--vae-batch=2", "--clips=2", "--batch=2",
    "--decoder-seconds=1", "--looked-at=1", "--steps=2", "--scored=1", "--any-hue",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(root: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wan_runtime.tiny.train", *options]
    done = subprocess.run(command, cwd=root, env=ONE_THREAD, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_one_run_trains_scores_and_leaves_all_that_another_goes_on_from(root: Path, tmp_path: Path) -> None:
    out, left = tmp_path / "out", tmp_path / "left"
    said = train(root, "all", "--out", str(out), "--parts", str(left), *SMALL)
    assert "vae, hue right" in said and "clips that show what was asked, of 1" in said
    sizes = [file.stat().st_size for file in left.iterdir()]
    assert len(sizes) <= 8 and max(sizes) <= parts.LIMIT

    parts.unpack(left, tmp_path / "pipeline")
    kept, made = (load_file(folder / parts.TRANSFORMER) for folder in (path(), tmp_path / "pipeline"))
    assert {k: (t.shape, t.dtype) for k, t in made.items()} == {
        k: (t.shape, t.dtype) for k, t in kept.items()
    }

    parts.restore(left, tmp_path / "again")
    for file in (
        "state/vae/diffusion_pytorch_model.safetensors",
        f"state/{parts.OPTIMISER}",
        f"pipeline/{parts.TRANSFORMER}",
    ):
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()


def test_the_vae_goes_on_from_its_moments(tmp_path: Path) -> None:
    options = vae.VaeOptions(batch=2, resolution=16)
    cpu = torch.device("cpu")
    vae.train(0.5, tmp_path, cpu, False, options)
    model = vae.build()
    opt = vae.optimiser(model)
    vae.resume(model, opt, tmp_path)
    moments = [opt.state[p]["exp_avg_sq"].abs().max().item() for p in model.parameters()]
    assert min(opt.state[p]["step"].item() for p in model.parameters()) >= 1
    assert max(moments) > 0


def test_the_decoder_is_trained_and_the_latents_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = vae.build()
    start.initialise(before)
    before.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    batches = vae.VaeOptions(batch=2, resolution=16)
    decoder.train(0.5, weights, torch.device("cpu"), batches, decoder.DecoderOptions())
    changed = {
        name.split(".")[0]
        for name, tensor in load_file(weights).items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_the_vae_starts_with_every_hue_right() -> None:
    """From random weights hue is the last thing it learns, and PSNR does not show it."""
    torch.manual_seed(0)
    model = vae.build()
    start.initialise(model)
    assert vae.hue(model, 2) == (1.0, 1.0)


def test_a_part_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(parts.LIMIT + 1)
    with pytest.raises(ValueError, match="16777217 bytes; a part may have 16777216"):
        parts.put(large, tmp_path / "left")
    with pytest.raises(FileNotFoundError, match="the run ended before its transformer was saved"):
        parts.unpack(tmp_path, tmp_path / "out")


def test_a_crowd_has_every_hue() -> None:
    """What trains the VAE's colours: no colour of a crowd is rare."""
    generator = torch.Generator().manual_seed(1)
    picture = (scenes.crowd(16, generator, frames=1, resolution=32) + 1) / 2
    assert picture.shape == (16, 3, 1, 32, 32)
    strongest = picture.mean((2, 3, 4)).argmax(1)
    assert set(strongest.tolist()) == {0, 1, 2}
