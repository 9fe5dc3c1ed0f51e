"""Every backend against fp64 arithmetic, wherever it says that it can run; refusals carry reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan_runtime.backends import AUTOMATIC, BACKENDS, COMPUTES, backend_named, device_named, multiplier
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.formats import FORMATS, _bytes

CPU = torch.device("cpu")
OUT, INP = 64, 96
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_right_wherever_they_are_served(backend: str, weight_format: str) -> None:
    record = BACKENDS[backend]
    slots = FORMATS[weight_format].quantize(torch.randn(OUT, INP) * 0.1, True)
    weight = FORMATS[weight_format].dequantize(slots).double()
    for compute in record.computes(weight_format):
        if record.refuses(weight_format, compute, CPU, (OUT, INP)) is not None:
            continue
        for dtype, rounding in ROUNDING.items():
            rows = torch.randn(5, INP).to(dtype)
            product = record.kernel(weight_format, compute)(rows, slots, None)
            truth = rows.double() @ weight.T
            assert product.dtype in (dtype, torch.float32)
            assert (product.double() - truth).norm() / truth.norm() < rounding, compute


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals_on_the_cpu_are_sentences(backend: str) -> None:
    record = BACKENDS[backend]
    for weight_format in FORMATS:
        for compute in COMPUTES:
            refusal = record.refuses(weight_format, compute, CPU, (OUT, INP))
            if compute in ("fp8", "nvfp4", "mxfp8"):
                assert refusal, f"{backend} says that it multiplies in {compute} on a CPU"
            assert refusal is None or len(refusal.split()) > 3


@pytest.mark.parametrize("weight_format", FORMATS)
def test_something_serves_every_format_on_the_cpu(weight_format: str) -> None:
    served = [
        name
        for name in AUTOMATIC
        for compute in backend_named(name).computes(weight_format)
        if backend_named(name).refuses(weight_format, compute, CPU, (OUT, INP)) is None
    ]
    assert served


def test_the_reference_takes_every_format_on_any_device() -> None:
    reference = backend_named("reference")
    for weight_format in FORMATS:
        for device in (CPU, torch.device("cuda", 0)):
            assert reference.refuses(weight_format, "fp32", device, (3, 16)) is None


class WithoutFloat8(TorchDispatchMode):
    """A device as Apple's GPUs are: no operation on float8 or fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for held in (*args, result):
            if isinstance(held, torch.Tensor) and (
                "float8" in str(held.dtype) or held.dtype == torch.float64
            ):
                raise TypeError(f"{func} on {held.dtype}")
        return result


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_reference_needs_no_float8_of_its_device(
    weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = FORMATS[weight_format].quantize(torch.randn(OUT, INP), True)
    rows = torch.randn(5, INP)
    multiply = backend_named("reference").kernel(weight_format, "fp32")
    expected = multiply(rows, slots, None)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8):
        every = torch.arange(256, dtype=torch.uint8)
        table = _bytes._table(dtype, CPU)  # made on the CPU, which has float8, and moved
        assert torch.equal(table.nan_to_num(1e9), every.view(dtype).float().nan_to_num(1e9))
    monkeypatch.setattr(_bytes, "FLOAT8_DEVICES", ())
    with WithoutFloat8():  # type: ignore[no-untyped-call]
        assert torch.equal(multiply(rows, slots, None), expected)


def test_backends_are_found_by_the_name_users_type() -> None:
    assert {BACKENDS[module].name for module in BACKENDS} >= {"torch", "reference"}
    assert backend_named("torch").name == "torch"
    with pytest.raises(BackendUnavailable, match=r"there are: .*torch") as caught:
        multiplier("cutlass", "fp8", "fp8")
    assert set(caught.value.refusals) == {"cutlass"}


@pytest.mark.parametrize("name", ["foo", "", "gpu", "cuda:x", "cuda:99", torch.device("cuda", 99), "vulkan"])
def test_a_device_that_is_not_there_is_refused_with_examples(name: str | torch.device) -> None:
    with pytest.raises(InvalidOption) as refused:
        device_named(name)
    assert repr(str(name)) in str(refused.value)
    assert "cuda:1" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_devices_that_are_there_are_taken_and_none_is_the_best_of_them() -> None:
    assert device_named("cpu") == device_named(CPU) == CPU
    assert device_named(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
