"""A reference decides by the error of every reading, and says so; of a marked file it confirms the marks or refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders.files import Content
from tests.faults.kinds import File, mislay, swap_nibbles
from tests.faults.trained import originals, trained
from wan_runtime.checkpoint import open_checkpoint, stream
from wan_runtime.errors import CheckpointError


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    bf16 = {key: tensor.bfloat16() for key, tensor in originals().items()}
    return Content(bf16).write(tmp_path / "reference", "bf16.safetensors")


def _unmarked(dialect: str) -> Content:
    tensors = trained(dialect, "nvfp4").tensors
    return Content({key: tensor for key, tensor in tensors.items() if not key.endswith("comfy_quant")})


@pytest.mark.parametrize("dialect", ["comfy", "modelopt", "modelopt_comfy"])
def test_a_reference_names_every_reading_s_error(tmp_path: Path, reference: Path, dialect: str) -> None:
    """Without its header, Model Optimizer's swizzled file is one reading more."""
    checkpoint = open_checkpoint(_unmarked(dialect).write(tmp_path), reference=reference)
    assert checkpoint.dialect.name == dialect
    said = checkpoint.evidence
    errors = {name: float(said.split(f"{name} ")[1][:5]) for name in ("comfy", "modelopt", "modelopt_comfy")}
    assert min(errors, key=lambda name: errors[name]) == dialect
    assert errors[dialect] < 0.15 and sorted(errors.values())[1] > 2 * errors[dialect]


def test_an_arrangement_that_no_dialect_reads_is_named(tmp_path: Path, reference: Path) -> None:
    """The even element high, and plain scales: nobody writes it."""
    held = _unmarked("modelopt")
    content = Content(held.tensors, trained("modelopt", "nvfp4").weights)
    [swapped] = swap_nibbles(File(content, "modelopt", "nvfp4"))
    words = r"no reading is close.*as comfy with scales taken for swizzled it would be 0\.\d+"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(swapped.write(tmp_path), reference=reference)


def test_a_marked_file_is_confirmed(tmp_path: Path, reference: Path) -> None:
    checkpoint = open_checkpoint(trained("comfy", "nvfp4").write(tmp_path), reference=reference)
    assert "comfy_quant record" in checkpoint.evidence
    assert "relative error to bf16.safetensors 0." in checkpoint.evidence


@pytest.mark.parametrize(
    ("fault", "words"), [(swap_nibbles, "nibbles swapped 0."), (mislay, "scales taken for")]
)
def test_a_reference_contradicts_a_mark(tmp_path: Path, reference: Path, fault: object, words: str) -> None:
    assert callable(fault)
    [damaged] = fault(File(trained("comfy", "nvfp4"), "comfy", "nvfp4"))
    with pytest.raises(CheckpointError, match="its marks say comfy") as caught:
        open_checkpoint(damaged.write(tmp_path), reference=reference)
    assert words in str(caught.value)


def test_a_reference_for_a_file_that_it_cannot_judge_changes_nothing(tmp_path: Path, reference: Path) -> None:
    path = trained("comfy_scaled_fp8", "fp8").write(tmp_path)
    checkpoint = open_checkpoint(path, reference=reference)
    assert checkpoint.evidence == open_checkpoint(path).evidence
    assert list(stream(checkpoint, torch.device("cpu")))
