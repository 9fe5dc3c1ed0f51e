"""This library's attention in hosts under the original names, for fused and unfused blocks alike.

Padding, a mask of the text and DiffSynth's image branch are left to the host's own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_runtime.attention import ENDS, Ends
from wan_runtime.residents import OwnDtype, become, kind_of, restore

from ._attending import Attending, name_in_block, said
from ._original_shape import host_class
from ._rotary import Rotations
from ._steps import unwatch, watch

ATTENDING = "_wan_runtime_attending"  # on an attention: its Attending
ROTATIONS = "_wan_runtime_rotations"  # on the release's self-attentions: the Rotations that they share
TEXT_TOKENS = 512  # in the release, the text is what follows the image's tokens


class SelfAttended(OwnDtype):
    """The release's WanSelfAttention."""

    def forward(
        self, x: torch.Tensor, seq_lens: torch.Tensor, grid_sizes: torch.Tensor, freqs: torch.Tensor
    ) -> Any:
        me: Any = self
        rotations: Rotations = self.__dict__[ROTATIONS]
        table = (
            "torch.compile traces it"
            if torch.compiler.is_compiling()
            else rotations.of_clip(x.shape[1], seq_lens, grid_sizes, freqs)
        )
        if isinstance(table, str):
            return super().forward(x, seq_lens, grid_sizes, freqs)
        q, k, v = me.norm_q(me.q(x)), me.norm_k(me.k(x)), _heads(me, me.v(x))
        q, k = (_rotated(_heads(me, t), table).to(v.dtype) for t in (q, k))
        return me.o(attending_of(me).attend(q, k, v).flatten(2).to(x.dtype))


class CrossAttended(OwnDtype):
    """The release's WanT2VCrossAttention, WanI2VCrossAttention and WanCrossAttention."""

    def forward(self, x: torch.Tensor, context: torch.Tensor, context_lens: torch.Tensor | None) -> Any:
        if context_lens is not None:
            return super().forward(x, context, context_lens)
        me: Any = self
        ahead = context.shape[1] - TEXT_TOKENS if has_image(me) else 0
        image, text = context[:, :ahead], context[:, ahead:]
        q = _heads(me, me.norm_q(me.q(x)))
        attended = _attended(me, q, me.norm_k(me.k(text)), me.v(text))
        if has_image(me):
            attended = attended + _attended(me, q, me.norm_k_img(me.k_img(image)), me.v_img(image))
        return me.o(attended.to(x.dtype))


class FlatAttended(OwnDtype):
    """DiffSynth's AttentionModule: q, k and v [batch, tokens, heads * head]."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return _attended(self, _heads(self, q), k, v)


def has_image(attention: nn.Module) -> bool:
    """Whether a cross-attention attends to an image too."""
    return hasattr(attention, "k_img")


def attending_of(attention: nn.Module) -> Attending:
    """The Attending of an attention that `install` has seen."""
    held = getattr(attention, "attn", attention)  # DiffSynth keeps it in a module of its own
    attending: Attending = held.__dict__[ATTENDING]
    return attending


def installed(attention: nn.Module) -> bool:
    """Whether `install` has seen an attention, and nothing has taken its place since."""
    return ATTENDING in getattr(attention, "attn", attention).__dict__


def _heads(attention: Any, x: torch.Tensor) -> torch.Tensor:
    split: torch.Tensor = x.unflatten(2, (attention.num_heads, -1))
    return split


def _attended(attention: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = _heads(attention, k), _heads(attention, v)
    return attending_of(attention).attend(q.to(v.dtype), k.to(v.dtype), v).flatten(2)


def _rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of x [batch, tokens, heads, head] turned by norm_rope's table, in fp32."""
    cos, sin = table[None, :, None].chunk(2, 3)
    even, odd = x.float().unflatten(3, (-1, 2)).unbind(4)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), 4).flatten(3)


def install(model: Any, name: str, planned_for: tuple[str, torch.dtype], ends: Ends = ENDS) -> list[str]:
    """Give every attention of a model's blocks this library's, chosen for a device type and a dtype; returns what a
    user should read. `ends` is FP8 attention's."""
    steps = watch(model, model.time_embedding, ends.steps, sinusoids=True) if name == "fp8" else None
    rotations, count = Rotations(), len(model.blocks)
    for number, block in enumerate(model.blocks):
        studio = host_class(block) == "DiTBlock"
        for attention, inner in ((block.self_attn, True), (block.cross_attn, False)):
            held = attention.attn if studio else attention
            become(held, FlatAttended if studio else SelfAttended if inner else CrossAttended)
            chosen = name_in_block(name, number, count, ends, inner=inner)
            held.__dict__[ATTENDING] = Attending(chosen, planned_for, steps)
            held.__dict__[ROTATIONS] = rotations
    return said(name, count, ends)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    unwatch(model)
    for module in model.modules():
        module.__dict__.pop(ATTENDING, None)
        module.__dict__.pop(ROTATIONS, None)
        if kind_of(module) in (SelfAttended, CrossAttended, FlatAttended):
            restore(module)
