"""The swap: all of it or nothing, undone to the tree as it was, and never over another library's work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wan_runtime
from tests.builders import files
from tests.builders.wan import block_linears, state
from tests.hosts.diffusers import checkpoint, error, run, transformer
from wan_runtime import doubts
from wan_runtime.errors import BackendUnavailable, CheckpointError, InvalidOption, WanRuntimeError
from wan_runtime.linear import QuantLinear, quantised_layers
from wan_runtime.residents import COMPUTE_DTYPE
from wan_runtime.swap import patched_state


def shape(model: nn.Module) -> list[Any]:
    """Everything of a module tree but its values: classes, parameters, buffers, flags."""
    modules = [(path, type(m), m.training) for path, m in model.named_modules()]
    parameters = [(n, p.dtype, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    buffers = [(n, b.dtype, tuple(b.shape)) for n, b in model.named_buffers()]
    return [*modules, *parameters, *buffers, *model.state_dict()]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_unpatch_gives_the_tree_back(weights: str, dtype: torch.dtype) -> None:
    model = transformer(dtype)
    model.get_submodule("blocks.0.ffn").requires_grad_(False)
    before, tensors = shape(model), values(model)
    wan_runtime.patch(model, weights=weights)
    assert shape(model) != before
    wan_runtime.unpatch(model)
    assert shape(model) == before
    assert patched_state(model) is None and COMPUTE_DTYPE not in dict(model.named_buffers())
    quantised = {f"{path}.weight" for path in block_linears(spelling="diffusers")}
    for name, tensor in model.state_dict().items():
        if name in quantised:
            assert 0 < error(tensor, tensors[name]) < (0.04 if weights == "fp8" else 0.12)
        else:
            assert torch.equal(tensor, tensors[name])
    assert wan_runtime.patch(model, weights=weights).already is False


def test_unpatching_an_unpatched_model_says_so() -> None:
    with pytest.raises(InvalidOption, match="not patched"):
        wan_runtime.unpatch(transformer())


def test_a_loaded_file_comes_back_dequantised(tmp_path: Path) -> None:
    content = files.comfy_scaled_fp8(state(), block_linears(), "fp8")
    model = transformer(seed=9)
    wan_runtime.patch(model, content.write(tmp_path))
    wan_runtime.unpatch(model)
    names = dict(zip(block_linears(), block_linears(spelling="diffusers"), strict=True))
    for original, weight in content.weights.items():
        held = model.get_submodule(names[original]).weight
        assert torch.equal(held, torch.from_numpy(weight).float())


def _broken(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        content = files.comfy_scaled_fp8(state(), block_linears(), "fp8")
        if kind == "truncated":
            path = content.write(folder)
            path.write_bytes(path.read_bytes()[:-5])
            return path
        if kind == "missing scale":
            del content.tensors[f"{block_linears()[-1]}.scale_weight"]
        elif kind == "negative scale":
            content.tensors[f"{block_linears()[-1]}.scale_weight"].mul_(-1)
        elif kind == "NaN norm":
            content.tensors["blocks.1.norm3.weight"][0] = float("nan")
        elif kind == "stray tensor":
            content.tensors["blocks.1.extra.weight"] = torch.zeros(2)
        elif kind == "missing bias":
            del content.tensors["blocks.1.ffn.2.bias"]
        elif kind == "wrong shape":
            content.tensors["blocks.1.ffn.2.bias"] = torch.zeros(3)
        return content.write(folder)

    return write


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "missing scale",
        "negative scale",
        "NaN norm",
        "stray tensor",
        "missing bias",
        "wrong shape",
    ],
)
def test_a_failed_load_leaves_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    path = _broken(kind)(tmp_path)
    model = transformer(seed=4)
    before, tensors, objects = shape(model), values(model), list(model.parameters())
    with pytest.raises(CheckpointError):
        wan_runtime.patch(model, path)
    assert shape(model) == before and patched_state(model) is None
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error_type"),
    [
        ({"compute": "fp8"}, BackendUnavailable),
        ({"backend": "te"}, BackendUnavailable),
        ({"attention": "fa3"}, BackendUnavailable),
        ({"weights": "int3"}, InvalidOption),
        ({"activation": "static"}, InvalidOption),
        ({"skip": ("blocks.7.*",)}, InvalidOption),
        ({"skip": None}, InvalidOption),
        ({"skip": (5,)}, InvalidOption),
    ],
)
def test_a_refused_option_leaves_the_model_as_it_was(
    options: dict[str, Any], error_type: type[WanRuntimeError]
) -> None:
    model = transformer()
    before, objects = shape(model), list(model.parameters())
    if torch.cuda.is_available():
        options = {**options, "backend": options.get("backend", "reference")}
    with pytest.raises(error_type):
        wan_runtime.patch(model, **options)
    assert shape(model) == before
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))


def test_the_swapped_tree_holds_no_plain_weight() -> None:
    model = transformer()
    report = wan_runtime.patch(model)
    layers = {path for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers == set(block_linears(spelling="diffusers")) == {d.path for d in report.quantised}
    assert not any(f"{path}.weight" in model.state_dict() for path in layers)
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.bytes_after < 0.6 * report.bytes_before


def test_training_mode_and_position_survive() -> None:
    model = transformer().train()
    wan_runtime.patch(model)
    assert all(module.training for module in model.modules())
    order = [path for path, _ in model.named_modules()]
    assert order == [path for path, _ in transformer().named_modules()]


def test_a_materialised_model_takes_the_files_values(tmp_path: Path) -> None:
    model = transformer(seed=8)
    wan_runtime.patch(model, checkpoint(tmp_path / "m.safetensors", seed=0), weights="keep")
    model.to(torch.float32)
    assert error(run(model), run(transformer(seed=0))) < 5e-3  # weights in bf16, the rest exact


def test_a_layer_that_does_not_fit_the_format_stays_and_says_so() -> None:
    from tests.builders.wan import Sizes

    model = transformer(sizes=Sizes(ffn=200))  # 200 is not a multiple of NVFP4's block of 16
    report = wan_runtime.patch(model, weights="nvfp4")
    kept = {d.path: d.reason for d in report.decisions if d.action == "linear"}
    assert set(kept) == {f"blocks.{n}.ffn.net.2" for n in (0, 1)}
    assert all("multiple of 16" in reason for reason in kept.values())
    assert run(model, torch.bfloat16).isfinite().all()


class Asked(TorchDispatchMode):
    """Counts the operators by which Python learns a value, each of which waits for a GPU that holds it."""

    NAMES = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket._qualified_op_name in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_no_layer_is_waited_for_while_a_model_is_patched(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubts, "MANY_ON_CPU", doubts.MANY)  # as on a GPU
    model = transformer()
    with Asked() as asked:
        bool(torch.ones(1).all())
        assert asked.count == 1  # it does see a question
        wan_runtime.patch(model, weights=weights)
    assert asked.count == 1


BIASES: dict[str, Callable[[QuantLinear, torch.Tensor], Any]] = {
    "in place": lambda layer, bias: layer.get_parameter("bias").copy_(bias),
    "a new parameter": lambda layer, bias: setattr(layer, "bias", nn.Parameter(bias, requires_grad=False)),
    "a state dict": lambda layer, bias: layer.load_state_dict({**layer.state_dict(), "bias": bias}),
}


@pytest.mark.parametrize("write", BIASES)
@torch.no_grad()
def test_a_bias_that_is_written_later_is_rounded_no_more_than_before(write: str) -> None:
    model = transformer()
    model.blocks[0].attn1.to_q.bias.fill_(0.5)
    wan_runtime.patch(model)
    layer = model.get_submodule("blocks.0.attn1.to_q")
    layer._biased = layer._multiply
    assert layer._adds_bias("cpu", torch.bfloat16)
    BIASES[write](layer, torch.full_like(layer.bias, 0.1))
    assert not layer._adds_bias("cpu", torch.bfloat16)
    BIASES[write](layer, torch.full_like(layer.bias, 0.5))
    assert layer._adds_bias("cpu", torch.bfloat16)


def test_biases_are_settled_together_and_a_layer_alone_asks_for_itself() -> None:
    model = transformer()
    linear = model.get_submodule("blocks.0.attn1.to_q")
    with torch.no_grad():
        linear.bias.copy_(torch.randn(linear.out_features).bfloat16())
    wan_runtime.patch(model)
    short = {path: layer._short_bias for path, layer in quantised_layers(model)}
    assert short.pop("blocks.0.attn1.to_q") is True and set(short.values()) == {False}
    layer = model.get_submodule("blocks.0.attn1.to_q")
    layer.load_state_dict(layer.state_dict())
    assert layer._short_bias is None
    layer._biased = layer._multiply  # what a product of codes has; a CPU has none
    assert layer._adds_bias("cpu", torch.bfloat16) and layer._short_bias is True
