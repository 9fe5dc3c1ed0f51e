"""A patched model whose layers multiply in NVFP4 and MXFP8, the software model in the place of `scaled_mm`: as the host
runs it, in fused blocks, and after a round trip of its state dict."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests import scaled_mm_model as model
from tests.builders.wan import TINY
from tests.hosts.diffusers import error, inputs, transformer
from tests.test_fused_block import Spy
from wan_runtime.backends import _block_scaled
from wan_runtime.kernels._codes import Codes
from wan_runtime.linear import quantised_layers
from wan_runtime.patches import _wan_block
from wan_runtime.patches._fused import takes_codes

# The bf16 product differs from the block-scaled one by the rounding of activations, in every layer.
APART = {"nvfp4": (0.005, 0.05), "mxfp8": (0.001, 0.02)}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the model reads tensors of the CPU"),
    pytest.mark.usefixtures("exact_casts"),
]


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[None]:
    """One entry for each call of a function from now on."""
    calls: list[None] = []
    function = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


def run(host: Any) -> torch.Tensor:
    result: torch.Tensor = host(**inputs())[0]
    return result


@torch.no_grad()
@pytest.mark.parametrize("compute", APART)
def test_a_whole_model(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        return model.scaled_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", call)
    host = transformer()
    wan_runtime.patch(host, weights=compute, attention="sdpa")
    host = host.to(torch.float32)
    plain, state = run(host), {name: tensor.clone() for name, tensor in host.state_dict().items()}
    assert made == 0
    layers = [layer for _, layer in quantised_layers(host)]
    for layer in layers:
        layer.compute = compute
        layer._bind()
    scaled = run(host)
    assert made == len(layers)
    least, most = APART[compute]
    assert least < error(scaled, plain) < most

    spy = Spy(monkeypatch)
    twin = copy.deepcopy(host)
    assert _wan_block.fuse(twin, "TWINS") == []
    kinds = {takes_codes(layer) for _, layer in quantised_layers(twin)}
    assert kinds == {Codes[compute.upper()]}  # blocks are made of codes
    quantised = counted(monkeypatch, _block_scaled, "_quantised")
    made = 0
    fused = run(twin)
    assert (spy.count, made) == (TINY.layers, len(layers))
    assert quantised == []  # no product had to quantise what it was given
    assert error(fused, scaled) < most
    assert least < error(fused, plain) < most

    now = host.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
    host.load_state_dict(state)
    assert torch.equal(run(host), scaled)
