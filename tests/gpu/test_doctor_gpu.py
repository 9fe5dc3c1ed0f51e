"""`doctor` on a GPU: the driver says what torch says, and what the GPU's kind promises was found to run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from wan_runtime import gpus
from wan_runtime.curing import UNKNOWN
from wan_runtime.doctor import Examination, examine

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found() -> Examination:
    return examine()


def test_the_driver_says_what_torch_says() -> None:
    driver = gpus.driver()
    assert driver is not None
    assert len(driver.gpus) == torch.cuda.device_count()
    for index, gpu in enumerate(driver.gpus):
        found = torch.cuda.get_device_properties(index)
        assert (gpu.name, gpu.capability) == (found.name, (found.major, found.minor))
        assert gpu.memory == pytest.approx(found.total_memory, rel=0.02)
    assert torch.version.cuda is not None and driver.cuda >= (int(torch.version.cuda.split(".")[0]), 0)


def test_nothing_stands_in_the_way_of_a_machine_that_runs_these_tests(found: Examination) -> None:
    assert found.advice == ()
    assert "GPU 0" in found.facts and "runs CUDA up to" in found.facts["NVIDIA driver"]


def test_fp8_products_run_where_the_gpu_has_them(found: Examination) -> None:
    probes = [
        probe
        for probe in found.probes
        if (probe.device, probe.compute) == ("cuda:0", "fp8")
        and (probe.backend != "te" or importlib.util.find_spec("transformer_engine"))
    ]
    assert probes
    for probe in probes:
        if torch.cuda.get_device_capability() >= gpus.HOPPER:
            assert probe.error is not None and probe.error < 0.1, probe.refusal
            chosen = found.chosen["cuda:0"][probe.format]
            assert chosen.startswith(("multiplied in fp8", f"multiplied in {probe.format}"))
        else:
            assert probe.error is not None or probe.fix != UNKNOWN


def test_attentions_and_kernels_run_or_have_a_fix(found: Examination) -> None:
    parts = {part.name: part for part in found.attentions if part.device == "cuda:0"}
    assert parts["attention sdpa"].refusal is None
    assert parts["fused kernels"].refusal is None
    assert all(part.fix != UNKNOWN for part in parts.values())
