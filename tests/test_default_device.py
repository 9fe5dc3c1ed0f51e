"""A script that set torch's default device: what is read, probed and patched there is what it is elsewhere.

The default device here is `meta`, where a tensor that is made without naming a device has no numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from tests.hosts.diffusers import inputs, transformer
from tests.reading import CASES, content
from wan_runtime import attention, doctor
from wan_runtime.backends import BACKENDS, _block_scaled, _granularity

CPU, META = torch.device("cpu"), torch.device("meta")


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs())[0]
    return result


@pytest.mark.parametrize(("dialect", "weight_format"), CASES)
def test_a_file_is_read_alike(tmp_path: Path, dialect: str, weight_format: str) -> None:
    path = content(dialect, weight_format).write(tmp_path)
    expected = wan_runtime.load(path, device=CPU, dialect=dialect)
    with META:
        found = wan_runtime.load(path, device=CPU, dialect=dialect)
    tensors = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name
    assert {t.device for t in (*found.parameters(), *found.buffers())} == {CPU}
    assert torch.equal(answer(found), answer(expected))


@pytest.mark.parametrize("weights", ["fp8", "nvfp4", "mxfp8", "keep"])
def test_a_model_is_patched_alike(weights: str) -> None:
    models = [transformer(), transformer()]
    wan_runtime.patch(models[0], weights=weights)
    with META:
        wan_runtime.patch(models[1], weights=weights)
    assert torch.equal(answer(models[1]), answer(models[0]))


def test_probes_ask_the_same() -> None:
    def asked() -> list[object]:
        said: list[object] = [
            _granularity.tried(product, CPU) for product in (_granularity.row_wise, _granularity.tensor_wise)
        ]
        said += [_block_scaled.tried(compute, CPU) for compute in ("nvfp4", "mxfp8")]
        said += [attention.refused(name, CPU, torch.float32, 128) for name in ("sdpa", "fa3")]
        return said + [
            doctor._probe(backend, "fp8", "bf16", CPU) for backend in (BACKENDS[name] for name in BACKENDS)
        ]

    expected = asked()
    attention._probe.cache_clear()
    with META:
        assert asked() == expected
