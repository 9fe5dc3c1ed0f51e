"""`import wan_runtime.autopatch` and `wan-runtime run`, on scripts that know nothing of the library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.hosts.diffusers import checkpoint, transformer


def python(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=root, capture_output=True, text=True)


IMPORTED = """
import json, sys
import wan_runtime.autopatch as autopatch
light = not any(name in sys.modules for name in ("diffusers", "transformers", "triton"))
from diffusers import WanTransformer3DModel
model = WanTransformer3DModel.from_pretrained(sys.argv[1])
formats = sorted({d.format for d in autopatch.armed.reports[0].quantised})
autopatch.armed.undo()
plain = WanTransformer3DModel.from_pretrained(sys.argv[1])
print(json.dumps([light, str(model.dtype), formats, str(plain.dtype), len(autopatch.armed.reports)]))
"""


def test_importing_it_patches_what_is_loaded_later(root: Path, tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "model")
    done = python(root, "-c", IMPORTED, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, "torch.bfloat16", ["fp8"], "torch.float32", 1]
    assert "wan_diffusers on" in done.stderr


TWO = """
import sys
from diffusers import WanTransformer3DModel
for path in sys.argv[1:]:
    WanTransformer3DModel.from_single_file(path)
sys.exit(0)
"""


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python(root, "-m", "wan_runtime.cli", "run", *arguments)


def test_run_fails_where_a_script_loads_nothing_to_patch(root: Path, tmp_path: Path) -> None:
    """It would otherwise be a clip of unquantised weights with exit status 0."""
    (tmp_path / "none.py").write_text(TWO)
    done = run(root, "--", tmp_path / "none.py")
    assert done.returncode != 0 and "ended without loading a WAN model" in done.stderr


@pytest.mark.long
def test_run_fails_where_one_file_is_given_for_two_experts(root: Path, tmp_path: Path) -> None:
    """It would otherwise be a wrong clip with exit status 0."""
    (tmp_path / "two.py").write_text(TWO)
    high = checkpoint(tmp_path / "high.safetensors")
    options = ("--checkpoint", high, "--weights", "fp8", "--", tmp_path / "two.py")
    done = run(root, *options, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert done.returncode != 0 and "--checkpoint-low" in done.stderr
    done = run(root, *options, tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr


def test_the_example_knows_nothing_of_the_library(root: Path) -> None:
    tree = ast.parse((root / "examples" / "text_to_video.py").read_text())
    modules = [
        name.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    ]
    assert modules and not any("wan_runtime" in module for module in modules)


@pytest.mark.slow
def test_the_diffusers_example_runs_patched(root: Path, tmp_path: Path) -> None:
    """The whole of it: the script's own output on stdout, the proof of the patch on stderr, a clip in the file."""
    clip = tmp_path / "clip.gif"
    done = python(
        root, "-m", "wan_runtime.cli", "run", "--weights", "nvfp4", "--",
        "examples/text_to_video.py", "--model", "models/tiny", "--device", "cpu", "--output", clip,
        "--height", 32, "--width", 32, "--frames", 5, "--steps", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{clip}: 5 frames of 32x32"
    assert "wan_diffusers on" in done.stderr and "nvfp4" in done.stderr
    with Image.open(clip) as image:
        assert (image.n_frames, image.size) == (5, (32, 32))  # type: ignore[attr-defined]
