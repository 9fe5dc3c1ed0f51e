"""`doctor`: what runs here runs when asked, what does not has its reason and a fix."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from wan_runtime.attention import ATTENTIONS
from wan_runtime.backends import BACKENDS
from wan_runtime.cli import app
from wan_runtime.doctor import Examination, examine
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.linear import QuantLinear


@pytest.fixture(scope="module")
def found() -> Examination:
    return examine()


def test_every_multiplier_and_attention_has_an_outcome_or_a_refusal_with_a_fix(found: Examination) -> None:
    cpu = [probe for probe in found.probes if probe.device == "cpu"]
    offered = {
        (backend.name, name, compute)
        for backend in (BACKENDS[key] for key in BACKENDS)
        for name in FORMATS
        for compute in backend.computes(name)
    }
    assert {(probe.backend, probe.format, probe.compute) for probe in cpu} == offered
    for probe in found.probes:
        assert (probe.error is None) == (probe.refusal is not None) == (probe.fix is not None)
        assert probe.error is None or probe.error < 0.1
    parts = {part.name: part for part in found.attentions if part.device == "cpu"}
    assert parts.keys() == {*(f"attention {name}" for name in ATTENTIONS), "fused kernels"}
    assert all((part.refusal is None) == (part.fix is None) for part in found.attentions)
    assert parts["attention sdpa"].refusal is None


@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_auto_takes_is_what_a_layer_on_this_device_does(found: Examination, weight_format: str) -> None:
    chosen = found.chosen["cpu"][weight_format]
    assert chosen == "dequantised, then multiplied in bf16 (torch)"
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    slots = dict(FORMATS[weight_format].quantize(weight, True))
    layer = QuantLinear(
        64, 64, format=weight_format, slots=slots, bias=None, backend="torch", compute="bf16", planned_for="cpu"
    )  # fmt: skip
    rows = torch.randn(3, 64)
    exact = rows @ FORMATS[weight_format].dequantize(slots).t()
    assert float((layer(rows) - exact).norm() / exact.norm()) < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answer of a machine without a GPU")
def test_without_a_gpu_it_says_so_and_what_then_happens(found: Examination) -> None:
    assert found.facts["GPU"].startswith("none that torch can use")
    [sentence] = found.advice
    assert "No NVIDIA GPU" in sentence or "The driver has" in sentence
    fp8 = [probe for probe in found.probes if probe.compute == "fp8"]
    assert fp8 and all("nothing to fix" in (probe.fix or "") for probe in fp8)
    text = " ".join(str(found).split())
    assert "attention cudnn" in text and "fp8, fp8_e5m2, nvfp4" in text


def test_an_attention_that_doctor_refuses_is_refused_by_name_too(found: Examination) -> None:
    from wan_runtime.attention import choose

    for part in found.attentions:
        name = part.name.removeprefix("attention ")
        if part.device == "cpu" and name in ATTENTIONS and part.refusal is not None:
            with pytest.raises(BackendUnavailable) as caught:
                choose(name, torch.device("cpu"), torch.bfloat16, 128)
            assert caught.value.refusals[name] == part.refusal


def test_the_command_gives_the_same_as_json(found: Examination) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    fields = json.loads(done.stdout)
    assert fields.keys() == found.to_dict().keys()
    assert fields["attentions"] == json.loads(found.to_json())["attentions"]
    assert fields["chosen"] == found.chosen
