"""What needs no diffusers to be refused is refused before it is imported, and long before a model is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import image_to_video
from wan_runtime.bases import tiny_base, tiny_checkpoint
from wan_runtime.generating import clip_profile
from wan_runtime.pipelines import load_pipeline
from wan_runtime.preparing import prepare

EARLY = {  # an option that no clip is made with -> what is said
    ("--size", "831x480"): "width 831 is not a multiple of 16",
    ("--size", "832x480"): "this model takes up to 65536",
    ("--frames", "1001"): "are more than this model's 65",
    ("--guidance-2", "3"): "guidance_scale_2 is for models with two experts",
    ("--compute", "fp9"): "compute='fp9' is not known",
    ("--weights", "int3"): "weights='int3' is not known",
    ("--activation", "x"): "activation='x' is not known",
    ("--attention", "fa9"): "attention='fa9' is not known",
    ("--attention-end-steps", "3"): "Ask for attention='fp8'",
    ("--backend", "cuda"): "there is no such backend",
    ("--dialect", "kohya"): "no dialect named 'kohya'",
    ("--checkpoint", "gone.safetensors"): "there is no such file",
    ("--base", "gone/folder/of/parts"): "there is no such directory",
    ("--base", "."): "there is no model_index.json in it",
    ("--vae", "gone"): "--vae gone is not there",
    ("--image", "IMAGE"): "which takes no start image",
    ("--base", "BASE"): "vae (there is no such folder)",
}
SERVED = ("--compute", "--weights", "--attention", "--backend", "--dialect", "--base")
SCRIPT = """
import sys
from typer.testing import CliRunner
from wan_runtime.cli import app
from wan_runtime.serve.cli import app as serve
for number, options in enumerate({asked!r}):
    runs = [(app, ("generate", "--prompt", "a cat"))]
    runs += [(serve, ("--dry-run",))] if options[0] in {served!r} else []
    for command, arguments in runs:
        result = CliRunner().invoke(command, [*arguments, *options])
        assert result.exit_code in (1, 2), (options, result.output, result.exception)
        print(number, " ".join(result.output.split()))
    heavy = [name for name in ("diffusers", "transformers") if name in sys.modules]
    assert not heavy, (options, heavy)
"""


def test_what_is_refused_before_diffusers_is_imported(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    shutil.rmtree(image_to_video.base(tmp_path / "base") / "vae")
    files = {"IMAGE": str(tmp_path / "start.png"), "BASE": str(tmp_path / "base")}
    asked = [(option, files.get(value, value)) for option, value in EARLY]
    script = SCRIPT.format(asked=asked, served=SERVED)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for number, words in enumerate(EARLY.values()):
        lines = [line for line in said if line.startswith(f"{number} ")]
        assert lines and all(words in line for line in lines), (words, lines)


def test_a_name_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from wan_runtime.cli import app\n"
        "try: app(['generate', '--prompt', 'a cat', *sys.argv[1:]])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    for options in (("--steps", "0"), ("--dtype", "int8"), ("--output", "clip.avi"), ("--image", "gone.png")):
        done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True)
        assert (done.returncode, "wan-runtime: " in done.stderr) == (0, True), done.stderr


@pytest.fixture(scope="module")
def of_48(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return image_to_video.ti2v(tmp_path_factory.mktemp("ti2v"))


def test_the_planned_profile_is_the_pipeline_s(tmp_path: Path, of_48: tuple[Path, Path]) -> None:
    """diffusers' pipeline is the oracle: its VAE, its experts, its configuration."""
    low = image_to_video.wan22(tmp_path / "low", 1.1)
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"checkpoint": of_48[0], "base": of_48[1]},
        {"checkpoint": of_48[0], "base": of_48[1], "vae": of_48[1] / "vae"},
        {"checkpoint": tiny_checkpoint(), "vae": tiny_base() / "vae" / "diffusion_pytorch_model.safetensors"},
        {"checkpoint": image_to_video.wan22(tmp_path), "checkpoint_low": low, "base": tiny_base()},
    )
    for parts in cases:
        planned = prepare(**parts, device="cpu").profile
        assert planned == clip_profile(load_pipeline(**parts, device="cpu")), parts


def test_a_vae_file_without_a_base_s_is_told_by_its_channels(
    tmp_path: Path, of_48: tuple[Path, Path]
) -> None:
    """As load_vae takes the published configuration then: pixels a latent are 16, and a patch is two of them."""
    base = shutil.copytree(of_48[1], tmp_path / "base")
    shutil.rmtree(base / "vae")
    key = "encoder.downsamples.0.downsamples.0.residual.0.gamma"
    tensors = {key: torch.zeros(2), "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}
    save_file(tensors, tmp_path / "vae.safetensors")
    profile = prepare(of_48[0], base=base, vae=tmp_path / "vae.safetensors", device="cpu").profile
    assert profile.size_multiple == 32
