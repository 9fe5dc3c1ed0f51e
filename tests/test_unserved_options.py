"""Options that could only be ignored are refused: an explicit choice is kept or is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from tests.hosts.diffusers import checkpoint, transformer
from wan_runtime.errors import BackendUnavailable, CheckpointError, InvalidOption


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("plain") / "model.safetensors")


@pytest.mark.parametrize(
    "options", [{"compute": "bf16"}, {"backend": "reference"}, {"backend": "te"}, {"compute": "fp8"}]
)
def test_how_to_multiply_needs_a_quantised_layer(plain: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="no layer would be quantised"):
        wan_runtime.load(plain, device="cpu", **options)


def test_an_unknown_backend_is_refused_whatever_the_file_holds(plain: Path) -> None:
    with pytest.raises(BackendUnavailable, match="'cutlass'"):
        wan_runtime.load(plain, device="cpu", backend="cutlass")


def test_a_reference_must_exist_even_where_no_doubt_needs_it(plain: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        wan_runtime.load(plain, device="cpu", reference=plain.with_name("absent.safetensors"))


@pytest.mark.parametrize("options", [{"dialect": "comfy"}, {"reference": "bf16.safetensors"}])
def test_how_to_read_needs_a_file(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="none was given"):
        wan_runtime.patch(transformer(), **options)


def test_skip_needs_something_to_quantise() -> None:
    with pytest.raises(InvalidOption, match=r"skip=\('\*ffn\*',\) .* without a file quantises nothing"):
        wan_runtime.patch(transformer(), weights="keep", skip="*ffn*")


def test_one_pattern_may_be_a_string_and_unpatch_gives_its_layers_back_to_the_bit() -> None:
    model = transformer().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = wan_runtime.patch(model, skip="blocks.0.*")
    assert not any(decision.path.startswith("blocks.0.") for decision in report.quantised)
    wan_runtime.unpatch(model)
    skipped = [name for name in before if name.startswith("blocks.0.")]
    assert skipped and all(torch.equal(model.state_dict()[name], before[name]) for name in skipped)
