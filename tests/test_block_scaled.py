"""NVFP4 and MXFP8 products of the torch backend, with the software model in the place of the one call that needs
Blackwell: `torch.nn.functional.scaled_mm` itself, and nothing around it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests import scaled_mm_model as model
from wan_runtime.backends import _block_scaled, backend_named, torch_native
from wan_runtime.fitting import notes
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear
from wan_runtime.plan import Decision, Options, choose

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
KINDS = {"nvfp4": model.NVFP4, "mxfp8": model.MXFP8}
COARSE = {
    "nvfp4": 0.14,
    "mxfp8": 0.04,
}  # what rounding the activations to the format costs, relative, at most
SHAPES = [
    (5, 64, 96),
    (1, 16, 32),
    (130, 144, 320),
]  # tokens, out, in: short of a tile of scales, and past one

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the model reads tensors of the CPU"),
    pytest.mark.usefixtures("exact_casts"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[inspect.BoundArguments]]:
    """The model in place of torch's function; what it was called with."""
    made: list[inspect.BoundArguments] = []
    signature = inspect.signature(torch.nn.functional.scaled_mm)
    assert list(signature.parameters) == list(inspect.signature(model.scaled_mm).parameters)

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(signature.bind(*args, **kwargs))
        return model.scaled_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", call)
    yield made


def drawn(tokens: int, out: int, inp: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, inp, generator=generator)
    rows *= torch.exp(torch.randn(tokens, 1, generator=generator))
    return rows.to(torch.bfloat16), torch.randn(out, inp, generator=generator) * inp**-0.5


def apart(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def values(call: inspect.BoundArguments, side: str) -> torch.Tensor:
    """One operand of a call in fp64, as the model reads it."""
    given = call.arguments
    codes = given["mat_a"] if side == "a" else given["mat_b"].t()
    kind = next(kind for kind in KINDS.values() if codes.dtype == kind.codes)
    read = (given[f"{name}_{side}"] for name in ("scale", "scale_recipe", "swizzle"))
    return torch.from_numpy(model.operand(side, kind, codes, *read))


@pytest.mark.parametrize(("tokens", "out", "inp"), SHAPES)
@pytest.mark.parametrize("compute", KINDS)
def test_products_are_those_of_the_quantised_operands(
    compute: str, tokens: int, out: int, inp: int, calls: list[inspect.BoundArguments]
) -> None:
    rows, weight = drawn(tokens, out, inp)
    slots = FORMATS[compute].quantize(weight, True)
    product = torch_native.kernel(compute, compute)(rows, slots, None)
    held = FORMATS[compute].dequantize(slots).double()
    assert apart(values(calls[0], "b"), held) < 1e-7  # every code and scale of the weight where it belongs
    activations = values(calls[0], "a")
    assert apart(activations, rows) < COARSE[compute]
    assert product.dtype == torch.bfloat16
    assert apart(product, activations @ held.T) < 4e-3
    assert apart(product, rows.double() @ held.T) < 1.2 * COARSE[compute]


@pytest.mark.parametrize("compute", KINDS)
def test_torchs_own_shape_rules_for_cuda_take_the_arguments(
    compute: str, calls: list[inspect.BoundArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's meta function for CUDA, which compiled graphs are checked by; it reads shapes, strides and dtypes."""
    for tokens, out, inp in SHAPES:
        rows, weight = drawn(tokens, out, inp)
        bias = torch.zeros(out, dtype=torch.bfloat16)
        biased = torch_native.biased(compute, compute)
        assert biased is not None
        biased(rows, FORMATS[compute].quantize(weight, True), None, bias)
    monkeypatch.undo()
    with FakeTensorMode():
        for call in calls:
            given = {name: _on_a_gpu(value) for name, value in call.arguments.items()}
            assert torch.nn.functional.scaled_mm(**given).shape == (
                call.arguments["mat_a"].shape[0],
                call.arguments["mat_b"].shape[1],
            )


def _on_a_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_a_gpu(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


@pytest.mark.parametrize("compute", KINDS)
def test_the_call_is_one_graph_for_torch_compile(compute: str) -> None:
    rows, weight = (torch.randn(*shape) for shape in ((33, 96), (144, 96)))
    a, b = (
        {slot: tensor.to("meta") for slot, tensor in FORMATS[compute].quantize(values, True).items()}
        for values in (rows, weight)
    )

    def product() -> torch.Tensor:
        return _block_scaled._product(
            compute, _block_scaled._laid(compute, a), _block_scaled._laid(compute, b), None
        )

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert compiled().shape == (33, 144)


def test_rows_of_eight_bytes_are_padded(calls: list[inspect.BoundArguments]) -> None:
    rows, weight = drawn(5, 32, 48)
    slots = FORMATS["nvfp4"].quantize(weight, True)
    product = torch_native.kernel("nvfp4", "nvfp4")(rows, slots, None)
    assert calls[0].arguments["mat_a"].shape == (5, 32) and slots["payload"].shape == (32, 24)
    held = FORMATS["nvfp4"].dequantize(slots).double()
    assert apart(values(calls[0], "b")[:, :48], held) < 1e-7
    assert not values(calls[0], "b")[:, 48:].any() and not values(calls[0], "a")[:, 48:].any()
    assert apart(product, values(calls[0], "a")[:, :48] @ held.T) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", KINDS)
def test_a_layer_keeps_its_bias_in_fp32_and_its_state_dict_canonical(
    compute: str, dtype: torch.dtype, calls: list[inspect.BoundArguments]
) -> None:
    rows, weight = drawn(6, 48, 96)
    slots = FORMATS[compute].quantize(weight, True)
    for bias, within in ((torch.full((48,), 100 / 3), False), (torch.full((48,), 33.5), True)):
        layer = QuantLinear(
            96,
            48,
            format=compute,
            slots=slots,
            bias=bias,
            backend="torch",
            compute=compute,
            planned_for="cpu",
        )
        calls.clear()
        result = layer(rows.to(dtype).reshape(2, 3, 96))
        assert result.dtype == dtype and result.shape == (2, 3, 48)
        exact = values(calls[0], "a") @ FORMATS[compute].dequantize(slots).double().T
        # bf16 adds to bf16 within the product where that loses nothing; else fp32 is added after it.
        assert (calls[0].arguments.get("bias") is not None) == (within and dtype == torch.bfloat16)
        assert apart(result.reshape(6, 48), exact + bias.double()) < 4e-3
        state = layer.state_dict()
        assert state["bias"].dtype == torch.float32 and torch.equal(state["bias"], bias)
        assert state.keys() - {"bias"} == slots.keys()
        assert all(torch.equal(state[name], slot) for name, slot in slots.items())
    assert layer(rows[:0]).shape == (0, 48)


def test_a_static_scale_is_the_tensors_and_saturates(calls: list[inspect.BoundArguments]) -> None:
    rows, weight = drawn(6, 48, 96)
    slots = FORMATS["nvfp4"].quantize(weight, True)
    multiply = torch_native.kernel("nvfp4", "nvfp4")
    right = rows.float().abs().max().reshape(1, 1) / 2688
    multiply(rows, slots, right)
    multiply(rows, slots, right / 100)
    assert calls[0].arguments["scale_a"][1] == right
    assert apart(values(calls[0], "a"), rows) < COARSE["nvfp4"]
    assert values(calls[1], "a").abs().max() == pytest.approx(float(right) * 26.88)


def test_a_static_scale_that_nothing_takes_is_said() -> None:
    for compute, said in (("mxfp8", True), ("nvfp4", False)):
        decision = Decision("blocks.0.ffn.0", "blocks.0.ffn.0", "quantised", "", compute, compute, "torch")
        given = notes([decision], GPU, None, Options(activation="static"))
        assert any("take no scale for their activations" in note for note in given) == said


def test_what_a_gpu_multiplies_is_found_by_multiplying(
    calls: list[inspect.BoundArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    for compute in KINDS:
        assert _block_scaled.tried(compute, CPU) is None
        assert any(call.arguments.get("bias") is not None for call in calls)
        assert {len(call.arguments["mat_a"]) for call in calls} == {33}  # no multiple of a tile

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return model.scaled_mm(*args, **kwargs) * 1.05

    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(model.scaled_mm(*args, **kwargs))

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nand more")

    for function, said in (
        (wrong, "a test product was wrong by 0.05 (relative error)"),
        (zeros, "a test product was wrong by 1.00 (relative error)"),
        (failing, "a test product failed: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"),
    ):
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", function)
        assert {_block_scaled.tried(compute, CPU) for compute in KINDS} == {said}
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")  # torch before it had the function
    assert "scaled_mm" in str(_block_scaled.tried("nvfp4", CPU))


def test_a_kernel_that_is_wrong_is_refused_though_the_product_is_right(
    calls: list[inspect.BoundArguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(compute: str, rows: torch.Tensor, static: torch.Tensor | None) -> _block_scaled.Operand:
        payload, scales, whole = _block_scaled._laid(compute, FORMATS[compute].quantize(rows, True))
        return payload.flip(0), scales, whole

    monkeypatch.setattr(_block_scaled, "_quantised", swapped)
    for compute in KINDS:
        assert str(_block_scaled.tried(compute, CPU)).startswith("a test product was wrong by")


@pytest.mark.parametrize("compute", KINDS)
def test_auto_takes_what_the_gpu_has_best_first(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (5120, 13824)
    monkeypatch.setitem(_block_scaled._REFUSED, (compute, 0), None)
    assert choose(compute, GPU, shape, Options()) == ("torch", compute, "")
    assert torch_native.coded(compute, compute) is not None  # fused kernels give it codes
    monkeypatch.setitem(_block_scaled._REFUSED, (compute, 0), "a test product failed: on Hopper")
    monkeypatch.setattr(torch_native, "_probe", lambda weight_format, index: None)
    backend, chosen, why = choose(compute, GPU, shape, Options())
    assert (backend, chosen) == ("torch", "fp8" if compute == "nvfp4" else "bf16")
    assert f"torch {compute} refused: a test product failed: on Hopper" in why


def test_sizes_that_do_not_fit_are_refused_with_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for compute in KINDS:
        monkeypatch.setitem(_block_scaled._REFUSED, (compute, 0), None)
    refuses = backend_named("torch").refuses
    assert (
        refuses("nvfp4", "nvfp4", GPU, (48, 48)) is None and refuses("mxfp8", "mxfp8", GPU, (48, 96)) is None
    )
    assert refuses("nvfp4", "nvfp4", GPU, (40, 96)) == (
        "NVFP4 products need dimensions that are multiples of 16; the weight is 40 x 96"
    )
    assert refuses("mxfp8", "mxfp8", GPU, (48, 80)) == (
        "MXFP8 products need dimensions that are multiples of 16 and 32; the weight is 48 x 80"
    )
    assert refuses("fp8", "nvfp4", GPU, (48, 96)) == "it has no nvfp4 product for fp8 weights"
    assert refuses("nvfp4", "nvfp4", CPU, (48, 96)) == "NVFP4 products need a CUDA GPU; the model is on cpu"


def test_amd_and_apple_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs, reference = backend_named("torch"), backend_named("reference")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for device, named in ((GPU, "an AMD GPU (ROCm)"), (torch.device("mps"), "a device of type 'mps'")):
        for weight_format in FORMATS:
            assert reference.refuses(weight_format, "fp32", device, (48, 96)) is None
            for compute in torchs.computes(weight_format):
                refusal = torchs.refuses(weight_format, compute, device, (48, 96))
                assert refusal is not None and named in refusal and "backend='reference'" in refusal
