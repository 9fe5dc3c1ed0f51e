"""Offloading of patched models by accelerate and diffusers: the bytes really leave, and the output stays what it was.

What needs a second device is in tests/gpu/test_offload_gpu.py. Here the second place is accelerate's weights map (the
module is left with meta tensors) and diffusers' disk folder (the module is left with empty tensors).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import HookRegistry, apply_group_offloading
from safetensors.torch import load_file
from torch import nn

import wan_runtime
from tests.hosts.diffusers import error, latents, pipeline, run, transformer
from tests.test_fused_block import Spy
from wan_runtime.errors import InvalidOption
from wan_runtime.linear import QuantLinear, quantised_layers
from wan_runtime.patches import _wan_block

CPU = torch.device("cpu")
Weights = pytest.mark.parametrize("weights", ["fp8", "nvfp4"])


def patched(weights: str = "fp8") -> Any:
    model = transformer(torch.bfloat16)
    wan_runtime.patch(model, weights=weights, skip=("blocks.1.ffn.*",))
    return model


def everything_on_meta(model: nn.Module) -> bool:
    tensors = dict(model.named_parameters())
    payloads = [layer.get_parameter("payload") for _, layer in quantised_layers(model)]
    assert len(payloads) == 18
    return all(t.is_meta for t in tensors.values()) and all(p.is_meta for p in payloads)


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in model.named_parameters()}


@Weights
@pytest.mark.parametrize("buffers", [False, True])
def test_accelerates_cpu_offload_takes_every_byte(weights: str, buffers: bool) -> None:
    model = patched(weights)
    before, types = run(model, torch.bfloat16), dtypes(model)
    cpu_offload(model, execution_device=CPU, offload_buffers=buffers)
    assert everything_on_meta(model) and model.dtype == torch.bfloat16
    for _ in range(2):
        assert torch.equal(run(model, torch.bfloat16), before)
        assert everything_on_meta(model), "the bytes stayed after the forward"
    assert dtypes(model) == types
    remove_hook_from_submodules(model)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(run(model, torch.bfloat16), before)


def test_accelerates_disk_offload(tmp_path: Path) -> None:
    model = patched()
    before = run(model, torch.bfloat16)
    disk_offload(model, str(tmp_path), execution_device=CPU)
    assert everything_on_meta(model)
    assert torch.equal(run(model, torch.bfloat16), before)


def test_accelerates_model_offload() -> None:
    model = patched()
    before = run(model, torch.bfloat16)
    model, hook = cpu_offload_with_hook(model, CPU)
    assert torch.equal(run(model, torch.bfloat16), before)
    hook.offload()
    assert torch.equal(run(model, torch.bfloat16), before)


ENABLE: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    # What enable_sequential_cpu_offload does; itself it asks for "cpu:0", on which accelerate fails with a stock model.
    "sequential": lambda pipe: cpu_offload(pipe.transformer, CPU, offload_buffers=True),
}


@pytest.mark.parametrize("how", ENABLE)
def test_the_pipelines_own_offloading(how: str) -> None:
    before = latents(pipeline(patched()))
    pipe = pipeline(patched())
    ENABLE[how](pipe)
    assert how == "model" or everything_on_meta(pipe.transformer)
    assert torch.equal(latents(pipe), before)
    assert how == "model" or everything_on_meta(pipe.transformer)
    assert pipe.transformer.dtype == torch.bfloat16


@Weights
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_diffusers_group_offload_takes_every_byte(weights: str, level: str, tmp_path: Path) -> None:
    model = patched(weights)
    before, types = run(model, torch.bfloat16), dtypes(model)
    payloads = {path: layer.get_parameter("payload").clone() for path, layer in quantised_layers(model)}
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_type=level,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    on_disk = [tensor for file in tmp_path.iterdir() for tensor in load_file(file).values()]
    for path, payload in payloads.items():
        assert any(
            t.shape == payload.shape and t.dtype == payload.dtype and t.equal(payload) for t in on_disk
        ), path
    # Scribble over what is left in memory: a forward that read it would show.
    for _, layer in quantised_layers(model):
        layer.get_parameter("payload").data.fill_(0x33)
    for _ in range(2):
        assert torch.equal(run(model, torch.bfloat16), before)
        for _, layer in quantised_layers(model):
            layer.get_parameter("payload").data.fill_(0x33)
    assert dtypes(model) == types and model.dtype == torch.bfloat16


def test_group_offload_through_the_pipeline(tmp_path: Path) -> None:
    before = latents(pipeline(patched()))
    pipe = pipeline(patched())
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(latents(pipe), before)


def test_patching_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    offloads: list[Callable[[Any], object]] = [
        lambda m: cpu_offload(m, execution_device=CPU),
        lambda m: apply_group_offloading(
            m, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path / "block"),
        ),
        lambda m: apply_group_offloading(
            m, onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "leaf")
        ),
    ]  # fmt: skip
    for offload in offloads:
        model = transformer(torch.bfloat16)
        offload(model)
        with pytest.raises(InvalidOption, match=r"Patch the model first, then enable offloading|meta device"):
            wan_runtime.patch(model)
        assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_model_offload_may_come_first() -> None:
    """Its one hook moves the whole model and holds no tensor."""
    before = run(patched(), torch.bfloat16)
    model: Any = transformer(torch.bfloat16)
    model, hook = cpu_offload_with_hook(model, CPU)
    wan_runtime.patch(model, skip=("blocks.1.ffn.*",))
    assert torch.equal(run(model, torch.bfloat16), before)
    hook.offload()
    assert torch.equal(run(model, torch.bfloat16), before)


def test_unpatching_an_offloaded_model_is_refused() -> None:
    model = patched()
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(InvalidOption, match="Turn offloading off"):
        wan_runtime.unpatch(model)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    remove_hook_from_submodules(model)
    wan_runtime.unpatch(model)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def _grouped(level: str) -> Callable[[Any], None]:
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    return lambda model: model.enable_group_offload(onload_device=CPU, offload_type=level, **blocks)


OFFLOADS: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "accelerate": (lambda model: cpu_offload(model, CPU), remove_hook_from_submodules),
    **{
        f"diffusers, {level}": (
            _grouped(level),
            lambda model: HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading"),
        )
        for level in ("leaf_level", "block_level")
    },
}


@pytest.mark.parametrize("how", OFFLOADS)
def test_unpatching_and_patching_once_offloading_is_off_again(how: str) -> None:
    """Hooks that are removed leave their module's forward as an attribute of it."""
    put, take = OFFLOADS[how]
    plain: Any = transformer(torch.bfloat16)
    put(plain)
    run(plain, torch.bfloat16)
    take(plain)
    wan_runtime.patch(plain, skip=("blocks.1.ffn.*",))
    model = patched()
    expected = run(model, torch.bfloat16)
    assert torch.equal(run(plain, torch.bfloat16), expected)
    put(model)
    run(model, torch.bfloat16)
    take(model)
    wan_runtime.unpatch(model)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert 0 < error(run(model, torch.bfloat16), expected) < 0.02


@pytest.mark.parametrize("how", OFFLOADS)
def test_blocks_are_fused_again_once_offloading_is_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, take = OFFLOADS[how]
    spy, model = Spy(monkeypatch), transformer(torch.bfloat16)
    wan_runtime.patch(model, attention="sdpa")
    with torch.no_grad():
        assert _wan_block.fuse(model, "TWINS") == []
    expected = run(model, torch.bfloat16)
    put(model)
    run(model, torch.bfloat16)
    take(model)
    spy.count = 0
    assert torch.equal(run(model, torch.bfloat16), expected) and spy.count == 2
