"""torch.compile on top of the fused blocks, with dynamo's own backend on the CPU: whole graphs, and few of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from torch._dynamo.utils import counters

import wan_runtime
from tests.hosts.diffusers import error
from tests.hosts.variants import built, inputs
from tests.test_fused_block import EXACT, coded, patched, run
from wan_runtime.backends import transformer_engine
from wan_runtime.formats import FORMATS
from wan_runtime.linear import quantised_layers
from wan_runtime.patches import _wan_block

SCALES = torch.ones(2)  # of VACE's control, a block


@pytest.mark.slow
def test_blocks_compile_whole_around_the_operators() -> None:
    small = torch.randn(1, 16, 1, 2, 4, generator=torch.Generator().manual_seed(0))  # the interpreter is slow
    model = patched()
    expected = run(model, hidden_states=small)
    _wan_block.fuse(model, "OPERATORS")
    coded(model)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert 1e-3 < error(run(model, hidden_states=small), expected) < 0.06
    assert counters["stats"]["unique_graphs"] == 1  # all blocks share it
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [[(3, 8, 8), (3, 8, 12), (3, 8, 16)], [(3, 6, 10), (3, 6, 14), (3, 10, 6), (2, 8, 6)]],
    ids=["widths", "widths, then heights"],
)
def test_blocks_compile_once_for_a_size_and_once_for_all_others(sizes: list[tuple[int, int, int]]) -> None:
    model = patched()
    _wan_block.fuse(model, "TWINS")
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for size in sizes:
        run(model, hidden_states=torch.randn(1, 16, *size))
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.mark.slow
def test_vace_s_blocks_compile_at_any_number_of_sizes() -> None:
    """Two kinds of block, and the two that differ in their parts among the second."""
    model = built("vace").requires_grad_(False)
    wan_runtime.patch(model, attention="sdpa")
    model.to(torch.float32)
    clips = [torch.randn(1, 16, 3, 4, width) for width in (4, 6, 8, 10, 12)]

    @torch.no_grad()
    def forward(clip: torch.Tensor) -> torch.Tensor:
        control = {
            "control_hidden_states": torch.ones(1, 24, *clip.shape[2:]),
            "control_hidden_states_scale": SCALES,
        }
        result: torch.Tensor = model(**inputs("vace") | {"hidden_states": clip} | control)[0]
        return result

    expected = [forward(clip) for clip in clips]
    _wan_block.fuse(model, "TWINS")
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert all(error(forward(clip), truth) < EXACT for clip, truth in zip(clips, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == 8
    torch._dynamo.reset()


@pytest.mark.slow
def test_switching_an_adapter_compiles_nothing_anew() -> None:
    from peft import LoraConfig

    model = patched()
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False))
    model.requires_grad_(False)
    _wan_block.fuse(model, "TWINS")
    clips = [
        torch.randn(1, 16, 1, 4, width, generator=torch.Generator().manual_seed(width)) for width in (4, 8)
    ]

    def forwards() -> list[torch.Tensor]:
        results = []
        for switch in (model.enable_adapters, model.disable_adapters):
            switch()
            for scale in (1.0, 0.5):
                model.set_adapters("default", scale)
                results += [run(model, hidden_states=clip) for clip in clips]
        return results

    expected = forwards()
    assert error(expected[0], expected[2]) > 1e-3 and error(expected[0], expected[4]) > 1e-3
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for results in (forwards(), forwards()):
        assert all(error(a, b) < EXACT for a, b in zip(results, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    twin = copy.deepcopy(model)
    twin.blocks[0].attn1.to_q.lora_A["default"].weight.data.mul_(3)
    torch._dynamo.reset()
    plain = run(twin, hidden_states=clips[0])
    twin.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert error(run(twin, hidden_states=clips[0]), plain) < EXACT  # its own adapters, not the first model's
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp8", "mxfp8", "nvfp4"])
def test_blocks_on_transformer_engine_compile_whole(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product is one operator; what that calls on a GPU is the exact product here."""
    made: list[str] = []

    def exact(compute: str, rows: Any, payload: Any, scale: Any, blocks: Any, static: Any, bias: Any) -> Any:
        made.append(compute)
        slots = {"payload": payload, "scale": scale, "block_scale": blocks}
        held = {name: slot for name, slot in slots.items() if slot is not None}
        return rows @ FORMATS[compute].dequantize(held).to(rows.dtype).T + (0 if bias is None else bias)

    monkeypatch.setattr(transformer_engine, "_product", exact)
    model = patched(weights=weights)
    expected = run(model)
    layers = [layer for _, layer in quantised_layers(model)]
    for layer in layers:
        layer.backend, layer.compute = "te", weights
        layer._bind()
    _wan_block.fuse(model, "TWINS")
    assert error(run(model), expected) < EXACT
    assert made == [weights] * len(layers)
    made.clear()
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert error(run(model), expected) < EXACT
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert made == [weights] * len(layers)
    torch._dynamo.reset()
