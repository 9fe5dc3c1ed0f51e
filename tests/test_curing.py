"""The fix for each refusal, and the advice for GPUs that torch does not see: on machines that are not this one."""

from __future__ import annotations

import pytest
import torch

from wan_runtime.attention import ATTENTIONS
from wan_runtime.attention import refused as attention_refused
from wan_runtime.backends import BACKENDS
from wan_runtime.curing import UNKNOWN, Torch, advice, fix_for
from wan_runtime.formats import FORMATS
from wan_runtime.gpus import Driver, Gpu
from wan_runtime.kernels import refused as kernels_refused

H200 = Driver((13, 0), (Gpu("NVIDIA H200", (9, 0), 141 * 2**30),))
RTX5090 = Driver((12, 8), (Gpu("NVIDIA GeForce RTX 5090", (12, 0), 32 * 2**30),))


def test_every_refusal_of_this_machine_has_a_fix_of_its_own() -> None:
    device = torch.device("cpu")
    refusals = [attention_refused(name, device, torch.bfloat16, 128) for name in ATTENTIONS]
    refusals.append(kernels_refused(device))
    for backend in (BACKENDS[name] for name in BACKENDS):
        for name in FORMATS:
            for shape in ((256, 256), (250, 250)):
                refusals += [
                    backend.refuses(name, compute, device, shape) for compute in backend.computes(name)
                ]
    said = {refusal for refusal in refusals if refusal is not None}
    assert len(said) >= 4
    assert UNKNOWN not in {fix_for(refusal) for refusal in said}


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("it is not installed (pip install fa3-fwd)", "pip install fa3-fwd"),
        ("Triton is not installed (it comes with torch's CUDA builds for Linux)", "pip install triton"),
        (
            "a test product failed on NVIDIA A100: torch._scaled_mm is only supported on CUDA devices with compute "
            "capability >= 9.0 or 8.9, or ROCm MI300+",
            "this GPU has no FP8 products",
        ),
        ("FP8 products need dimensions that are multiples of 16; the weight is 250 x 256", "dequantised"),
        ("failed: RuntimeError: something new", "report it"),
    ],
)  # fmt: skip
def test_refusals_of_other_machines(refusal: str, said: str) -> None:
    assert said in fix_for(refusal)


@pytest.mark.parametrize(
    ("driver", "found", "said"),
    [
        (None, Torch("2.13.0+cpu", None, 0), "No NVIDIA GPU was found"),
        (H200, Torch("2.13.0+cpu", None, 0), "H200, and torch 2.13.0+cpu was built without CUDA"),
        (RTX5090, Torch("2.13.0+cu130", "13.0", 0), "runs CUDA 12.8 at most: update the driver"),
        (H200, Torch("2.13.0+cu130", "13.0", 0), "CUDA_VISIBLE_DEVICES"),
        (RTX5090, Torch("2.5.1+cu124", "12.4", 1, ("sm_80", "sm_90")), "no kernels for NVIDIA GeForce RTX 5090 (sm"),
        (H200, Torch("2.13.0+cu130", "13.0", 1, ("sm_80", "sm_90", "sm_120")), None),
        (RTX5090, Torch("2.13.0+cu128", "12.8", 1, ("sm_90", "compute_90")), None),
        (None, Torch("2.13.0+rocm", None, 1), None),
    ],
)  # fmt: skip
def test_the_advice_for_a_machine(driver: Driver | None, found: Torch, said: str | None) -> None:
    sentences = advice(driver, found)
    assert len(sentences) == (said is not None)
    assert said is None or said in sentences[0]
