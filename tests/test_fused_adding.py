"""Products that add themselves to the residual stream: the fused blocks with an fp64 model of what cuBLASLt does,
against the same blocks that pass over the stream to add. The library itself runs on a GPU
(tests/gpu/test_adding_gpu.py).

Three products a block add themselves, but for the first block's first: its stream is the host's, which stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from tests import test_fused_block, test_fused_original
from tests.builders.wan import TINY, Sizes
from tests.hosts.diffusers import error
from wan_runtime.backends import Added, _cublaslt, torch_native
from wan_runtime.formats import FORMATS, Slots
from wan_runtime.linear import QuantLinear, quantised_layers

ROUNDING = 4e-3  # the other way rounds each product to bf16 before it is added


class Adding:
    """cuBLASLt's product as arithmetic, and the layers that it was asked of, by their addresses."""

    def __init__(self) -> None:
        self.into: list[int] = []

    def __call__(
        self, codes: torch.Tensor, scale: torch.Tensor, slots: Slots, factor: torch.Tensor | None, into: torch.Tensor
    ) -> None:  # fmt: skip
        product = (codes.double() * scale) @ FORMATS["fp8"].dequantize(slots).double().T
        into.copy_(into.double() + product * (1 if factor is None else factor.double()))
        self.into.append(into.data_ptr())


def adding(model: Any) -> tuple[Any, Adding]:
    """A copy of a fused model whose products take codes, with products that add themselves."""
    twin, arithmetic = copy.deepcopy(model), Adding()
    for module in twin.modules():
        if isinstance(module, QuantLinear):
            module.compute = "fp8"
            module._bind()
            module.added = Added(lambda into: True, arithmetic)
    return twin, arithmetic


def plain_rows(layer: Any) -> None:
    """Have a layer take plain rows, whose product does not add itself."""
    layer.compute = "bf16"
    layer._bind()


def trained(model: Any) -> Any:
    """Biases, gates and norms of the size that a trained model's have: a fresh one's are zeros and ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and name.rpartition(".")[2] in (
                "bias",
                "modulation",
                "scale_shift_table",
            ):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def in_diffusers(sizes: Sizes = TINY) -> tuple[Any, Any, Adding]:
    model = test_fused_block.fused(trained(test_fused_block.patched(sizes, weights="fp8")))
    return test_fused_block.coded(copy.deepcopy(model)), *adding(model)


def test_diffusers_blocks_give_the_same() -> None:
    plain, twin, arithmetic = in_diffusers(Sizes(layers=4))
    expected = test_fused_block.run(plain)
    for _ in range(2):
        arithmetic.into.clear()
        assert 0 < error(test_fused_block.run(twin), expected) < ROUNDING
    assert len(arithmetic.into) == 3 * 4 - 1
    assert len(set(arithmetic.into)) == 1


def test_the_releases_blocks_give_the_same() -> None:
    model = test_fused_original.fused(trained(test_fused_original.patched(release="2.1")))
    plain, (twin, arithmetic) = test_fused_original.coded(copy.deepcopy(model)), adding(model)
    expected = test_fused_original.run(plain)
    for _ in range(2):
        arithmetic.into.clear()
        assert 0 < error(test_fused_original.run(twin), expected) < ROUNDING
    assert len(arithmetic.into) == 3 * TINY.layers - 1


@pytest.mark.parametrize(("left_out", "count"), [(None, 8 + 8), ("blocks.1.attn1.to_out.0", 7 + 7)])
def test_what_a_block_gave_is_not_written_to_again(left_out: str | None, count: int) -> None:
    _, twin, arithmetic = in_diffusers(Sizes(layers=3))
    if left_out is not None:  # its sum is of the stream that the host holds
        plain_rows(twin.get_submodule(left_out))
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in twin.blocks:
        block.register_forward_pre_hook(lambda _, args: given.append((args[0], args[0].clone())))
        block.register_forward_hook(lambda _, args, result: given.append((result, result.clone())))
    for _ in range(2):
        test_fused_block.run(twin)
    assert len(arithmetic.into) == count and len(given) == 12
    assert all(torch.equal(now, then) for now, then in given)


def test_a_host_that_adds_to_the_stream_between_blocks_is_heeded() -> None:
    plain, twin, arithmetic = in_diffusers(Sizes(layers=3))
    expected = []
    for model in (plain, twin):
        model.blocks[0].register_forward_hook(lambda _, args, result: result + 1)
        test_fused_block.run(model)
        expected.append(test_fused_block.run(model))
    assert 0 < error(expected[1], expected[0]) < ROUNDING
    assert len(arithmetic.into) == 7 + 7  # the second block too begins with a stream of the host's


def test_a_block_that_is_brought_in_its_turn_is_not_begun_before() -> None:
    _, twin, arithmetic = in_diffusers(Sizes(layers=3))
    expected = test_fused_block.run(twin)
    cpu = torch.device("cpu")
    twin.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    arithmetic.into.clear()
    assert 0 < error(test_fused_block.run(twin), expected) < ROUNDING
    assert len(arithmetic.into) == 6  # each begins with a stream of the host's


def test_what_is_computed_does_not_hang_on_what_was_run_before() -> None:
    _, twin, _ = in_diffusers(Sizes(layers=3))
    first = test_fused_block.run(twin)
    assert torch.equal(test_fused_block.run(twin), first)
    skipped = twin.blocks.pop(1)
    assert not torch.equal(test_fused_block.run(twin), first)
    twin.blocks.insert(1, skipped)
    assert torch.equal(test_fused_block.run(twin), first)
    assert torch.equal(test_fused_block.run(twin.to("cpu", torch.float32)), first)


@pytest.mark.parametrize(
    "left_out", ["blocks.1.attn1.to_out.0", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.2", "blocks.0.attn2.to_q"]
)  # fmt: skip
def test_one_layer_that_does_not_add_among_those_that_do(left_out: str) -> None:
    plain, twin, arithmetic = in_diffusers(Sizes(layers=3))
    for model in (plain, twin):
        plain_rows(model.get_submodule(left_out))
        test_fused_block.run(model)
    arithmetic.into.clear()
    assert 0 < error(test_fused_block.run(twin), test_fused_block.run(plain)) < ROUNDING
    # After a block that ends in a pass the next one's first sum is of a stream that the host holds.
    assert len(arithmetic.into) == {"to_q": 8, "2": 6}.get(left_out.rpartition(".")[2], 7)


def test_tokens_of_different_gates_are_added_by_a_pass() -> None:
    plain, twin, arithmetic = in_diffusers()
    timestep = ((torch.arange(48) >= 16) * 500.0)[None]
    assert (
        error(test_fused_block.run(twin, timestep=timestep), test_fused_block.run(plain, timestep=timestep))
        < 1e-6
    )
    assert not arithmetic.into


def test_a_model_without_the_norm_before_cross_attention() -> None:
    model = test_fused_block.patched(weights="fp8")
    for block in model.blocks:
        block.norm2 = nn.Identity()  # as diffusers has it where cross_attn_norm is False
    model = test_fused_block.fused(trained(model))
    plain, (twin, arithmetic) = test_fused_block.coded(copy.deepcopy(model)), adding(model)
    for _ in range(2):
        assert 0 < error(test_fused_block.run(twin), test_fused_block.run(plain)) < ROUNDING
    assert len(arithmetic.into) == 2 * (3 * TINY.layers - 1)


def test_products_without_a_bias() -> None:
    plain, twin, _ = in_diffusers()
    for model in (plain, twin):
        for _, layer in quantised_layers(model):
            layer.register_parameter("bias", None)
    for _ in range(2):
        assert 0 < error(test_fused_block.run(twin), test_fused_block.run(plain)) < ROUNDING


def test_a_gpu_that_cannot_add_is_told_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    into = torch.empty(2, 16, dtype=torch.bfloat16)
    assert not _cublaslt.takes(into)
    assert torch_native.added("fp8", "bf16") is None and torch_native.added("nvfp4", "nvfp4") is None
    gpu = torch.device("cuda", 0)
    assert torch_native.remark(gpu) is None
    monkeypatch.setitem(_cublaslt._REFUSED, 0, "a test product failed: it has no such product")
    said = torch_native.remark(gpu)
    assert said is not None and "residual stream" in said and "no such product" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a cuBLASLt")
def test_a_torch_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cublaslt, "_REFUSED", {})
    assert str(_cublaslt.refuses(0)).startswith("torch's cuBLASLt is not to be found: ")
