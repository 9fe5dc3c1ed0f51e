"""fp32 residents inside a bf16 host: what stock diffusers cannot run runs, and nothing takes fp32 away."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wan_runtime
from tests.hosts.diffusers import error, inputs, run, transformer
from wan_runtime.errors import InvalidOption
from wan_runtime.linear import QuantLinear
from wan_runtime.residents import become, kind_of, original_class, restore

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to bf16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "half and back": lambda m: m.half().float().bfloat16(),
}


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return run(transformer())


def patched(**options: Any) -> Any:
    model = transformer(torch.bfloat16)
    wan_runtime.patch(model, **options)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.mark.parametrize("path", ["patch_embedding", "proj_out", "condition_embedder.time_proj"])
def test_stock_diffusers_fails_where_a_patched_model_runs(path: str) -> None:
    """Why residents exist: one fp32 module in a bf16 model is enough."""
    stock = transformer(torch.bfloat16)
    stock.get_submodule(path).float()
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        run(stock, torch.bfloat16)
    assert run(patched(), torch.bfloat16).dtype == torch.bfloat16


def test_bf16_forward_is_close_to_fp32(truth: torch.Tensor) -> None:
    assert error(run(patched(), torch.bfloat16), truth) < 0.04


@pytest.mark.parametrize("cast", CASTS)
def test_fp32_survives_casts(cast: str) -> None:
    model = patched(skip=("blocks.1.ffn.*",))
    follow = {f"blocks.1.ffn.net.{leaf}.weight" for leaf in ("0.proj", "2")}
    before = fixed(model, follow)
    tables = model.get_buffer("rope.freqs_cos").clone()
    CASTS[cast](model)
    assert same(fixed(model, follow), before)
    assert {t.dtype for t in before.values()} == {torch.float32, torch.uint8}
    assert torch.equal(model.get_buffer("rope.freqs_cos"), tables)
    assert {model.get_parameter(name).dtype for name in follow} == {model.dtype}


def fixed(model: nn.Module, follow: set[str]) -> dict[str, torch.Tensor]:
    """Every tensor but the skipped weights, which follow the host's dtype."""
    return {name: tensor for name, tensor in tensors(model).items() if name not in follow}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_model_dtype_is_the_compute_dtype(dtype: torch.dtype) -> None:
    model: Any = patched()
    assert model.dtype == torch.bfloat16
    model.to(dtype)
    assert model.dtype == dtype
    assert run(model, dtype).dtype == dtype
    assert next(model.parameters()).dtype == torch.float32
    for module in model.modules():  # what a host asks for a compute dtype is never a code's
        first = next(module.parameters(), None)
        assert first is None or first.dtype.is_floating_point


def test_dtype_is_fp16_for_an_fp16_host() -> None:
    model: Any = transformer(torch.float16)
    wan_runtime.patch(model)
    assert model.dtype == torch.float16
    assert run(model, torch.float16).isfinite().all()


def test_state_dict_round_trip(truth: torch.Tensor) -> None:
    model = patched()
    other = transformer(torch.bfloat16, seed=5)
    wan_runtime.patch(other)
    assert not same(tensors(other), tensors(model))
    other.load_state_dict(tensors(model), strict=True)
    assert same(tensors(other), tensors(model))
    assert torch.equal(run(other, torch.bfloat16), run(model, torch.bfloat16))


@pytest.mark.parametrize("weights", ["keep", "fp8"])
def test_tensors_that_are_assigned_are_cast_as_copied_ones_are(weights: str) -> None:
    model, twin = patched(weights=weights), patched(weights=weights)
    floats = (torch.float32, torch.bfloat16)
    state = {
        name: tensor.bfloat16() * 2 if tensor.dtype in floats else tensor
        for name, tensor in tensors(model).items()
    }
    model.load_state_dict(state)
    twin.load_state_dict(state, assign=True)
    assert same(tensors(twin), tensors(model))
    assert torch.equal(run(twin, torch.bfloat16), run(model, torch.bfloat16))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_patched_models(how: str) -> None:
    model = patched(skip=("blocks.1.ffn.*",))
    twin: Any = COPIES[how](model)
    assert same(tensors(twin), tensors(model))
    assert twin.dtype == torch.bfloat16
    assert torch.equal(run(twin, torch.bfloat16), run(model, torch.bfloat16))
    assert [kind_of(m) for m in twin.modules()] == [kind_of(m) for m in model.modules()]
    twin.half()
    assert {p.dtype for p in twin.parameters()} == {torch.float32, torch.uint8, torch.float16}
    assert wan_runtime.patch(twin).already
    wan_runtime.unpatch(twin)
    assert not any(isinstance(m, QuantLinear) for m in twin.modules())
    assert any(isinstance(m, QuantLinear) for m in model.modules()), "the copy shares the model's modules"


def test_residents_compute_in_fp32_under_autocast() -> None:
    """Autocast would round the patch embedding and the head to bf16."""
    model = patched()
    x = inputs()["hidden_states"]
    embedding = model.get_submodule("patch_embedding")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = embedding(x)
    with torch.no_grad():
        assert torch.equal(inside, embedding(x))
        assert inside.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resident_rounds_once(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64)
    x = torch.randn(5, 64).to(dtype)
    truth = (x.double() @ layer.weight.double().T + layer.bias.double()).to(dtype)
    become(layer, "resident")
    layer.bfloat16()
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x), truth, rtol=rounding, atol=1e-6)
    assert layer(x).dtype == dtype


def test_an_unquantised_linear_keeps_its_bias_in_fp32() -> None:
    layer = nn.Linear(64, 8)
    bias = layer.bias.detach().clone()
    parameter = layer.bias
    become(layer, "linear")
    layer.half().bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias is parameter, "offloading holds on to the parameter object"
    assert torch.equal(layer.bias, bias)
    x = torch.randn(3, 64).bfloat16()
    truth = x.double() @ layer.weight.double().T + bias.double()
    assert error(layer(x).detach(), truth.detach()) < 6e-3
    assert layer(x.float()).dtype == torch.float32
    become(layer, "linear")
    assert layer(x[0]).shape == (8,)


def test_become_and_restore() -> None:
    layer = nn.LayerNorm(4)
    become(layer, "resident")
    assert isinstance(layer, nn.LayerNorm) and type(layer).__name__ == "LayerNorm"
    assert original_class(layer) is nn.LayerNorm
    become(layer, "own")  # from one kind to another, never nested
    assert original_class(layer) is nn.LayerNorm and kind_of(layer) == "own"
    restore(layer)
    assert type(layer) is nn.LayerNorm
    restore(layer)
    assert type(layer) is nn.LayerNorm and kind_of(layer) is None


def test_integer_inputs_and_other_results_pass_through() -> None:
    embedding = nn.Embedding(4, 2)
    become(embedding, "resident")
    embedding.half()
    assert embedding(torch.tensor([1, 2])).dtype == torch.float32


def test_save_pretrained_is_refused(tmp_path: Any) -> None:
    model: Any = patched()
    with pytest.raises(InvalidOption, match="unpatch"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    wan_runtime.unpatch(model)
    model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir())
