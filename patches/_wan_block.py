"""diffusers' WAN blocks on the fused forward: what each part is called there, and when the host's own forward runs.

A block takes the host's forward where something else holds one of its parts: another attention processor, a hook on a
norm (offloading by leaves), training, autocast. A linear that an adapter wraps or a hook holds is called like any
module, and only its own quantisation is no longer fused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from wan_runtime.errors import InvalidOption
from wan_runtime.residents import Move, OwnDtype, become, kind_of, restore

from . import Blocks, _carrying, _fused, _patch_embedding, _text
from ._attention_processor import TEXT_TOKENS, Processor, install, uninstall
from ._called import KEY, leaf
from ._context import keys_values
from ._diffusers_shape import is_block, norms, unlike
from ._rotary import SizeTables
from ._shared import Expanded, Shared, announce
from ._sharing import MEMO, SharingBlock
from ._snapshot import held, tracked
from ._unfusable import notes, obstacle, traced


class Memo(NamedTuple):
    """What a fused block knows beside its parts; `kernels` is a member of wan_runtime.kernels.fused, by name."""

    shared: Shared
    number: int
    kernels: str


class FusedBlock(SharingBlock):
    """A WanTransformerBlock that runs `_fused.forward` where it can."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _hosts(self, args, kwargs):
            return super().forward(*args, **kwargs)
        return run(self, *args)


class FusedVaceBlock(SharingBlock):
    """A WanVACETransformerBlock that does. torch.compile allows each forward so many graphs, so it has its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _hosts(self, args, kwargs):
            return super().forward(*args, **kwargs)
        x, context, control, temb, rotary = args
        parts: Any = self
        proj_in, proj_out = parts.proj_in, parts.proj_out
        if proj_in is not None:
            control = proj_in(control) + x
        control = run(self, control, context, temb, rotary)
        return (None if proj_out is None else proj_out(control)), control


def _hosts(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call takes the host's forward."""
    if not args or kwargs or not args[0].is_floating_point():
        return True
    return unfusable(block) is not None or traced(args) is not None


class FusedEmbedder(OwnDtype):
    """The condition embedder: tells the blocks that a forward begins, and embeds each distinct timestep once.

    TI2V-5B has a timestep a token, of which one or two differ; the host would embed and project every one.
    """

    def forward(
        self, timestep: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None = None,
        timestep_seq_len: int | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        shared: Shared = self.__dict__[MEMO][0]
        shared.begin()
        if timestep_seq_len is None or torch.compiler.is_compiling():
            return super().forward(timestep, text, image, timestep_seq_len, **kwargs)
        distinct, index = torch.unique(timestep, return_inverse=True)
        temb, steps, text, image = super().forward(distinct, text, image, **kwargs)
        expanded = steps.expand(index.numel(), -1) if len(distinct) == 1 else steps[index]
        shared.steps = Expanded(expanded, steps.unflatten(1, (6, -1)), index.to(torch.int32))
        shape = (-1, timestep_seq_len)
        return temb[index].unflatten(0, shape), expanded.unflatten(0, shape), text, image


class FusedRotary(OwnDtype):
    """The rotary embedding: its tables depend on the clip's size alone, so they are made once a size."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        forward, buffers = super().forward, held(self)
        if torch.compiler.is_compiling() or not tracked(buffers):
            return forward(hidden_states)
        kept: SizeTables = self.__dict__[MEMO]
        of = (*hidden_states.shape[2:], hidden_states.device)
        return kept.tables(of, buffers, lambda: forward(hidden_states))

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.__dict__[MEMO] = SizeTables()
        return super()._apply(fn, recurse)


KINDS = (FusedBlock, FusedVaceBlock, FusedEmbedder, FusedRotary)


def fuse(model: nn.Module, kernels: str = "TRITON") -> list[str]:
    """Put a patched model's blocks on the fused forward; returns what a user should read.

    `kernels` names a member of wan_runtime.kernels.fused. Raises InvalidOption where the model has no block to fuse.
    """
    blocks = [(path, module) for path, module in model.named_modules() if is_block(module)]
    if not blocks:
        raise InvalidOption("the model has no WAN block to fuse.")
    shared = Shared()
    for at, (_, block) in enumerate(blocks):
        if unlike(block) is not None:
            continue
        become(block, FusedVaceBlock if hasattr(block, "proj_in") else FusedBlock)
        block.__dict__[MEMO] = Memo(shared, at, kernels)
        announce(block, shared, at)
    for name, kind in (("condition_embedder", FusedEmbedder), ("rope", FusedRotary)):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            become(part, kind)
            part.__dict__[MEMO] = (shared,) if kind is FusedEmbedder else SizeTables()
            if kind is FusedEmbedder:
                _text.fuse(part.get_submodule("text_embedder"))
    _patch_embedding.fuse(model)
    return notes([block for _, block in blocks], lambda block: unlike(block) or unfusable(block), _linears)


def _linears(block: Any) -> list[nn.Module]:
    one, two = block.attn1, block.attn2
    image = [] if two.add_k_proj is None else [two.add_k_proj, two.add_v_proj]
    attention = [
        linear for part in (one, two) for linear in (part.to_q, part.to_k, part.to_v, part.to_out[0])
    ]
    return [*attention, *image, block.ffn.net[0].proj, block.ffn.net[2]]


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        module.__dict__.pop(MEMO, None)
        module.__dict__.pop(KEY, None)
        _text.unfuse(module)
        _patch_embedding.unfuse(module)
        if kind_of(module) in KINDS:
            restore(module)


def unfusable(block: Any) -> str | None:
    """Why a block must take the host's forward now, in words, or None."""
    kernels = block.__dict__[MEMO].kernels
    device = block.scale_shift_table.device
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    for attention in (block.attn1, block.attn2):
        if not isinstance(attention.processor, Processor):
            return f"its attention processor is {type(attention.processor).__name__}"
        if attention.processor.elsewhere or getattr(attention, "fused_projections", False):
            return "its attention is set up by the host"
    return obstacle(block, device, kernels, (*_uncalled(block), *norms(block)))


def _uncalled(block: Any) -> tuple[nn.Module, ...]:
    """What the kernels stand for or pass by: all but a block's Linears and its attentions' norms."""
    one, two, ffn = block.attn1, block.attn2, block.ffn
    dropouts = (one.to_out[1], two.to_out[1], ffn.net[1])
    return block.norm1, block.norm2, block.norm3, one, two, ffn, ffn.net[0], *dropouts


def run(
    block: Any, x: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, rotary_emb: Any
) -> torch.Tensor:
    """The fused forward of one block, from the host's arguments."""
    from wan_runtime.kernels import fused

    shared, at, kernels = block.__dict__[MEMO]
    parts = _parts(block, x.shape[1], shared, at)
    chosen = fused.kernels_named(kernels)
    table = None if rotary_emb is None else shared.rotary_table(*rotary_emb)
    cross = parts.cross_attention
    image = 0 if cross.image is None else encoder_hidden_states.shape[1] - TEXT_TOKENS
    context = keys_values(cross, encoder_hidden_states, image, shared, at, chosen)
    place = None if torch.compiler.is_compiling() else _carrying.Place(at, _entrance)
    return _carrying.run(shared, place, parts, x, temb, block.scale_shift_table, table, context, chosen)


def _entrance(block: Any) -> _carrying.Entrance | None:
    """How a block begins that will run fused on the stream of the one before it."""
    if hasattr(block, "proj_in") or unfusable(block) is not None:
        return None
    shared, at, _ = block.__dict__[MEMO]
    attention = _self_attention(block, 0, shared, at)
    return _carrying.Entrance(block.scale_shift_table, attention, block.norm1.eps)


def _self_attention(block: Any, tokens: int, shared: Shared, at: int) -> _fused.SelfAttention:
    one = block.attn1
    norm_q, norm_k, heads, processor = one.norm_q, one.norm_k, one.heads, one.processor
    coded = processor.coded(norm_q, norm_k, heads, tokens, shared, at)
    return _fused.SelfAttention(*_leaves(block, "attn1", one), norm_q, norm_k, heads, processor.attend, coded)


def _leaves(block: Any, name: str, part: Any) -> tuple[Any, Any, Any, Any]:
    """An attention's q, k, v and output projections."""
    return (
        leaf(block, f"{name}.to_q", part.to_q),
        leaf(block, f"{name}.to_k", part.to_k),
        leaf(block, f"{name}.to_v", part.to_v),
        leaf(block, f"{name}.to_out.0", part.to_out[0]),
    )


def _parts(block: Any, tokens: int, shared: Shared, at: int) -> _fused.Block:
    two, net = block.attn2, block.ffn.net
    image = None
    if two.add_k_proj is not None:
        image = (
            leaf(block, "attn2.add_k_proj", two.add_k_proj),
            leaf(block, "attn2.add_v_proj", two.add_v_proj),
            two.norm_added_k,
        )
    return _fused.Block(
        self_attention=_self_attention(block, tokens, shared, at),
        cross_attention=_fused.CrossAttention(
            *_leaves(block, "attn2", two), two.norm_q, two.norm_k, two.heads, two.processor.attend, image
        ),
        norm2=block.norm2 if isinstance(block.norm2, nn.LayerNorm) else None,
        up=leaf(block, "ffn.net.0.proj", net[0].proj),
        down=leaf(block, "ffn.net.2", net[2]),
        eps1=block.norm1.eps,
        eps3=block.norm3.eps,
    )  # fmt: skip


def _restore(model: nn.Module) -> None:
    unfuse(model)
    uninstall(model)


def _head(model: Any) -> int:
    size: int = model.config.attention_head_dim
    return size


BLOCKS = Blocks(head=_head, attend=install, fuse=fuse, restore=_restore)
