"""Every backend against fp64 arithmetic, wherever it says that it can run; refusals carry reasons."""

from __future__ import annotations

import pytest
import torch

from wan_runtime.backends import AUTOMATIC, BACKENDS, COMPUTES, backend_named, device_named, multiplier
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.formats import FORMATS

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
