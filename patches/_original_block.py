"""The release's WanAttentionBlock (Wan2.1 and Wan2.2) and DiffSynth-Studio's DiTBlock on the fused forward.

The residual stream has the dtype that the host's own forward would give it: fp32 in the release, whose blocks add an
fp32 product to it under autocast, and the model's in DiffSynth. Autocast stays on for the leaves that are called.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from wan_runtime.errors import InvalidOption
from wan_runtime.residents import OwnDtype, become, kind_of, restore

from . import Blocks, _carrying, _fused, _text
from ._called import KEY, leaf
from ._context import keys_values
from ._modulation import distinct
from ._original_attention import TEXT_TOKENS, attending_of, has_image, install, installed, uninstall
from ._original_shape import host_class, unlike
from ._rotary import Rotations
from ._shared import Expanded, Shared, announce
from ._sharing import MEMO, SharingBlock
from ._unfusable import notes, obstacle, traced

STUDIO_IMAGE_TOKENS = 257  # in DiffSynth, the image is what comes before these many tokens


class Memo:
    """What a fused block knows beside its parts.

    shared, rotations  what the model's blocks share.
    number             the block's.
    kernels            a member of wan_runtime.kernels.fused, by name.
    said               why blocks of the model take the host's forward, as far as the user was told.
    """

    def __init__(
        self, shared: Shared, rotations: Rotations, number: int, kernels: str, said: set[str]
    ) -> None:
        self.shared, self.rotations, self.number, self.kernels = shared, rotations, number, kernels
        self.said = said


class FusedReleaseBlock(SharingBlock):
    """A WanAttentionBlock that runs `_fused.forward` where it can."""

    def forward(
        self, x: torch.Tensor, e: torch.Tensor, seq_lens: torch.Tensor, grid_sizes: torch.Tensor,
        freqs: torch.Tensor, context: torch.Tensor, context_lens: torch.Tensor | None,
    ) -> Any:  # fmt: skip
        memo: Memo = self.__dict__[MEMO]
        why, table = unfusable(self) or traced((x, e, context)), None
        if why is None and context_lens is not None:
            why = "the text is masked (context_lens)"
        if why is None and torch.compiler.is_compiling():
            why = "torch.compile traces it, and the clip's size is in a tensor"
        if why is None:
            found = memo.rotations.of_clip(x.shape[1], seq_lens, grid_sizes, freqs)
            why, table = (found, None) if isinstance(found, str) else (None, found)
        if why is not None or table is None:
            _tell(memo, str(why))
            return super().forward(x, e, seq_lens, grid_sizes, freqs, context, context_lens)
        ahead = context.shape[1] - TEXT_TOKENS if has_image(self.get_submodule("cross_attn")) else 0
        return run(self, x, e, table, context, ahead)


class FusedStudioBlock(SharingBlock):
    """A DiTBlock that runs `_fused.forward` where it can."""

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, t_mod: torch.Tensor, freqs: torch.Tensor
    ) -> Any:
        memo: Memo = self.__dict__[MEMO]
        why = unfusable(self) or traced((x, context, t_mod))
        if why is None and (freqs.ndim != 3 or freqs.shape[:2] != (x.shape[1], 1)):
            why = f"its rotations are {list(freqs.shape)} for {x.shape[1]} tokens"
        if why is not None:
            _tell(memo, why)
            return super().forward(x, context, t_mod, freqs)
        ahead = STUDIO_IMAGE_TOKENS if has_image(self.get_submodule("cross_attn")) else 0
        return run(self, x, t_mod, memo.rotations.of_tokens(freqs), context, ahead)


class FusedTime(OwnDtype):
    """time_embedding or time_projection: computes each distinct row once where each token has one.

    Wan2.2 gives every token a timestep, of which one or two differ. The first of the two tells the blocks that a
    forward begins, the second which rows differ.
    """

    def forward(self, x: torch.Tensor) -> Any:
        shared, last = self.__dict__[MEMO]
        if not last:
            shared.begin()
        if x.ndim != 3 or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.flatten(0, 1)
        at, index = distinct(rows)
        made = super().forward(rows[at])
        expanded = made.expand(len(rows), -1) if len(at) == 1 else made[index]
        if last:
            shared.steps = Expanded(expanded, made.unflatten(1, (6, -1)), index)
        return expanded.unflatten(0, x.shape[:2])


KINDS: dict[str, type[SharingBlock]] = {"WanAttentionBlock": FusedReleaseBlock, "DiTBlock": FusedStudioBlock}


def refuses(model: Any) -> str | None:
    """Why a model's blocks are not those of this page, in words, or None."""
    for name in ("time_embedding", "time_projection"):
        if not isinstance(getattr(model, name, None), nn.Sequential):
            return f"its {name} is not a Sequential"
    return next((why for block in model.blocks if (why := unlike(block)) is not None), None)


def fuse(model: Any, kernels: str = "TRITON") -> list[str]:
    """Put a patched model's blocks on the fused forward; returns what a user should read.

    `kernels` names a member of wan_runtime.kernels.fused. Raises InvalidOption for other blocks than this page's.
    """
    why = refuses(model)
    if why is not None:
        raise InvalidOption(f"the model has no block to fuse: {why}.")
    shared, rotations, said = Shared(), Rotations(), set[str]()
    for at, block in enumerate(model.blocks):
        become(block, KINDS[str(host_class(block))])
        block.__dict__[MEMO] = Memo(shared, rotations, at, kernels, said)
        announce(block, shared, at)
    for name, last in (("time_embedding", False), ("time_projection", True)):
        part = getattr(model, name)
        become(part, FusedTime)
        part.__dict__[MEMO] = (shared, last)
    if isinstance(getattr(model, "text_embedding", None), nn.Sequential):
        _text.fuse(model.text_embedding)
    said.update(why for block in model.blocks if (why := unfusable(block)) is not None)
    return notes(list(model.blocks), unfusable, _linears)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        module.__dict__.pop(KEY, None)
        _text.unfuse(module)
        if module.__dict__.pop(MEMO, None) is not None and kind_of(module) in (*KINDS.values(), FusedTime):
            restore(module)


def _tell(memo: Memo, why: str) -> None:
    """Say once a model why blocks take the host's forward, where the report could not know it."""
    if why not in memo.said and not torch.compiler.is_compiling():
        memo.said.add(why)
        warnings.warn(
            f"A block runs the host's own forward: {why}. Nothing is wrong; it is slower.",
            RuntimeWarning,
            stacklevel=3,
        )


def _linears(block: Any) -> list[nn.Module]:
    one, two = block.self_attn, block.cross_attn
    image = [two.k_img, two.v_img] if has_image(two) else []
    return [
        *(part.get_submodule(n) for part in (one, two) for n in "qkvo"),
        *image,
        block.ffn[0],
        block.ffn[2],
    ]


def unfusable(block: Any) -> str | None:
    """Why a block must take the host's forward now, in words, or None."""
    one, two = block.self_attn, block.cross_attn
    if not installed(one) or not installed(two):
        return "its attention is the host's own"
    norms = [norm for part in (one, two) for name, norm in part.named_children() if name.startswith("norm_")]
    inner = [part.attn for part in (one, two) if hasattr(part, "attn")]
    more = [block.gate] if hasattr(block, "gate") else []
    parts = [block.norm1, block.norm2, block.norm3, one, two, block.ffn, block.ffn[1], *norms, *inner, *more]
    return obstacle(block, block.modulation.device, block.__dict__[MEMO].kernels, parts)


def run(
    block: Any, x: torch.Tensor, steps: torch.Tensor, table: torch.Tensor, context: torch.Tensor, image: int
) -> torch.Tensor:
    """The fused forward of one block.

    Args:
        x: [batch, tokens, width].
        steps: what the host made of the timesteps; see `_modulation.rows_of`.
        table: norm_rope's table [tokens, head].
        context: [batch, tokens, width], of which the first `image` tokens are an image's.

    Returns [batch, tokens, width] in the dtype that the host's own forward gives: of x and `steps` the wider.
    """
    from wan_runtime.kernels import fused

    memo: Memo = block.__dict__[MEMO]
    kernels = fused.kernels_named(memo.kernels)
    parts = _parts(block, x.shape[1], memo)
    context_kv = keys_values(parts.cross_attention, context, image, memo.shared, memo.number, kernels)
    stream = x.to(torch.promote_types(x.dtype, steps.dtype))
    place = None if torch.compiler.is_compiling() else _carrying.Place(memo.number, _entrance)
    return _carrying.run(
        memo.shared, place, parts, stream, steps, block.modulation, table, context_kv, kernels
    )


def _entrance(block: Any) -> _carrying.Entrance | None:
    """How a block begins that will run fused on the stream of the one before it."""
    if unfusable(block) is not None:
        return None
    attention = _self_attention(block, 0, block.__dict__[MEMO])
    return _carrying.Entrance(block.modulation, attention, block.norm1.eps)


def _self_attention(block: Any, tokens: int, memo: Memo) -> _fused.SelfAttention:
    one = block.self_attn
    norm_q, norm_k, heads, attending = one.norm_q, one.norm_k, one.num_heads, attending_of(one)
    coded = attending.coded(norm_q, norm_k, heads, tokens, memo.shared, memo.number)
    return _fused.SelfAttention(
        *_leaves(block, "self_attn", one), norm_q, norm_k, heads, attending.attend, coded
    )


def _leaves(block: Any, name: str, part: Any) -> tuple[Any, Any, Any, Any]:
    """An attention's q, k, v and output projections."""
    return (
        leaf(block, f"{name}.q", part.q),
        leaf(block, f"{name}.k", part.k),
        leaf(block, f"{name}.v", part.v),
        leaf(block, f"{name}.o", part.o),
    )


def _parts(block: Any, tokens: int, memo: Memo) -> _fused.Block:
    two = block.cross_attn
    image = None
    if has_image(two):
        image = (
            leaf(block, "cross_attn.k_img", two.k_img),
            leaf(block, "cross_attn.v_img", two.v_img),
            two.norm_k_img,
        )
    return _fused.Block(
        self_attention=_self_attention(block, tokens, memo),
        cross_attention=_fused.CrossAttention(
            *_leaves(block, "cross_attn", two),
            two.norm_q,
            two.norm_k,
            two.num_heads,
            attending_of(two).attend,
            image,
        ),
        norm2=block.norm3 if isinstance(block.norm3, nn.LayerNorm) else None,
        up=leaf(block, "ffn.0", block.ffn[0]),
        down=leaf(block, "ffn.2", block.ffn[2]),
        eps1=block.norm1.eps,
        eps3=block.norm2.eps,
    )


def _restore(model: nn.Module) -> None:
    unfuse(model)
    uninstall(model)


def _head(model: Any) -> int:
    block = model.blocks[0]
    size: int = block.modulation.shape[2] // block.self_attn.num_heads
    return size


BLOCKS = Blocks(head=_head, attend=install, fuse=fuse, restore=_restore, refuses=refuses)
