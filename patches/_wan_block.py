"""diffusers' WAN blocks on the fused forward: what each part is called there, and when the host's own forward runs.

A block takes the host's forward where something else holds one of its parts: another attention processor, a hook on a
norm (offloading by leaves), training, autocast. A linear that an adapter wraps or a hook holds is called like any
module, and only its own quantisation is no longer fused.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from wan_runtime.errors import InvalidOption
from wan_runtime.residents import Move, OwnDtype, become, kind_of, restore

from . import Blocks, _fused
from ._attention_processor import Processor, install, uninstall
from ._shared import Shared

CLASSES = ("WanTransformerBlock", "WanVACETransformerBlock")
MEMO = (
    "_wan_runtime_fused"  # of a fused block: (what the model's blocks share, the block's number, its kernels)
)
TEXT_TOKENS = 512  # with image context, what follows it: diffusers counts on it too


class FusedBlock(OwnDtype):
    """A WanTransformerBlock, or VACE's, that runs `_fused.forward` where it can."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if unfusable(self) is not None or not args or kwargs or not args[0].is_floating_point():
            return super().forward(*args, **kwargs)
        if hasattr(self, "proj_in"):
            return self._vace(*args)
        return run(self, *args)

    def _vace(
        self, x: torch.Tensor, context: torch.Tensor, control: torch.Tensor, temb: torch.Tensor, rotary: Any
    ) -> Any:
        parts: Any = self
        proj_in, proj_out = parts.proj_in, parts.proj_out
        if proj_in is not None:
            control = proj_in(control) + x
        control = run(self, control, context, temb, rotary)
        return (None if proj_out is None else proj_out(control)), control

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.__dict__[MEMO][0].clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__[MEMO][0].clear()
        super()._load_from_state_dict(*args, **kwargs)


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
        shared.steps = (expanded, steps.unflatten(1, (6, -1)), index.to(torch.int32))
        shape = (-1, timestep_seq_len)
        return temb[index].unflatten(0, shape), expanded.unflatten(0, shape), text, image


class FusedRotary(OwnDtype):
    """The rotary embedding: its tables depend on the clip's size alone, so they are made once a size."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        sizes, device = hidden_states.shape[2:], hidden_states.device
        kept = self.__dict__.get(MEMO)
        if kept is None or kept[0] != (sizes, device):
            kept = self.__dict__[MEMO] = ((sizes, device), super().forward(hidden_states))
        return kept[1]

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.__dict__.pop(MEMO, None)
        return super()._apply(fn, recurse)


def fuse(model: nn.Module, kernels: str = "TRITON") -> list[str]:
    """Put a patched model's blocks on the fused forward; returns what a user should read.

    `kernels` names a member of wan_runtime.kernels.fused. Raises InvalidOption where the model has no block to fuse.
    """
    blocks = [(path, module) for path, module in model.named_modules() if _is_block(module)]
    if not blocks:
        raise InvalidOption("the model has no WAN block to fuse.")
    shared = Shared()
    for number, (_, block) in enumerate(blocks):
        become(block, FusedBlock)
        block.__dict__[MEMO] = (shared, number, kernels)
    for name, kind in (("condition_embedder", FusedEmbedder), ("rope", FusedRotary)):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            become(part, kind)
            if kind is FusedEmbedder:
                part.__dict__[MEMO] = (shared,)
    whys = Counter(why for _, block in blocks if (why := unfusable(block)) is not None)
    said = [f"{count} blocks run the host's own forward: {why}." for why, count in sorted(whys.items())]
    held = sum(_held(leaf) for _, block in blocks for leaf in _linears(block))
    if held:
        said.append(
            f"{held} Linears of the blocks are wrapped by an adapter or carry a hook: they are called as they are, and "
            "quantise their own input."
        )
    return said


def _linears(block: Any) -> list[nn.Module]:
    one, two = block.attn1, block.attn2
    image = [] if two.add_k_proj is None else [two.add_k_proj, two.add_v_proj]
    attention = [
        linear for part in (one, two) for linear in (part.to_q, part.to_k, part.to_v, part.to_out[0])
    ]
    return [*attention, *image, block.ffn.net[0].proj, block.ffn.net[2]]


def _held(linear: nn.Module) -> bool:
    return not isinstance(linear, nn.Linear) or _fused.hooked(linear) is not None


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        module.__dict__.pop(MEMO, None)
        if kind_of(module) in (FusedBlock, FusedEmbedder, FusedRotary):
            restore(module)


def _is_block(module: nn.Module) -> bool:
    return any(
        cls.__name__ in CLASSES and cls.__module__.startswith("diffusers.") for cls in type(module).__mro__
    )


def unfusable(block: Any) -> str | None:
    """Why a block must take the host's forward now, in words, or None."""
    _, _, kernels = block.__dict__[MEMO]
    payload = block.scale_shift_table
    if kernels == "TRITON" and payload.device.type != "cuda":
        return f"the fused kernels need a GPU and the block is on {payload.device.type}"
    if torch.is_autocast_enabled(payload.device.type):
        return "autocast is on"
    if torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters()):
        return "gradients are on"
    for attention in (block.attn1, block.attn2):
        if not isinstance(attention.processor, Processor):
            return f"its attention processor is {type(attention.processor).__name__}"
        if attention.processor.elsewhere or getattr(attention, "fused_projections", False):
            return "its attention is set up by the host"
    for part in (block.norm1, block.norm2, block.norm3, block.attn1, block.attn2, block.ffn, *_norms(block)):
        hook = _fused.hooked(part)
        if hook is not None:
            return f"{type(part).__name__} carries {hook}"
    return None


def _norms(block: Any) -> list[nn.Module]:
    norms = [block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k]
    return [*norms, block.attn2.norm_added_k] if block.attn2.add_k_proj is not None else norms


def run(
    block: Any, x: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, rotary_emb: Any
) -> torch.Tensor:
    """The fused forward of one block, from the host's arguments."""
    from wan_runtime.kernels import fused

    shared, number, kernels = block.__dict__[MEMO]
    modulation, index = _modulation(block.scale_shift_table, temb, x.shape[0], x.shape[1], shared)
    parts = _parts(block, shared, number)
    chosen = fused.kernels_named(kernels)
    table = None if rotary_emb is None else shared.rotary_table(*rotary_emb)

    def make() -> list[_fused.KeysValues]:
        return _keys_values(parts.cross_attention, encoder_hidden_states, chosen)

    cross = parts.cross_attention
    keep = all(_fused.takes_codes(module) for module in (cross.k, cross.v, *(cross.image or ())[:2]))
    if keep and not torch.compiler.is_compiling():
        context = shared.keys_values(number, encoder_hidden_states, make)
    else:
        context = make()
    if (
        torch.compiler.is_compiling() or x.is_inference()
    ):  # no identities, or no versions, to tell a stream by
        return _fused.forward(parts, x, modulation, index, table, context, chosen)[0]
    shared.blocks[number] = block
    rows = shared.take(number, x, temb)
    following = _following(shared, number + 1, x, temb)
    result, rows = _fused.forward(
        parts, x, modulation, index, table, context, chosen, rows=rows, following=following
    )
    shared.carry(number + 1, result, temb, rows)
    return result


def _following(shared: Shared, number: int, x: torch.Tensor, temb: torch.Tensor) -> _fused.Following | None:
    """The first norm of the block of a number, where that is fused, on this device, and was given our stream before."""
    from wan_runtime.kernels.norm_modulate import Modulation

    block: Any = shared.blocks.get(number)
    if block is None or number in shared.unwanted or block.scale_shift_table.device != x.device:
        return None
    if hasattr(block, "proj_in") or unfusable(block) is not None:
        return None
    modulation, index = _modulation(block.scale_shift_table, temb, x.shape[0], x.shape[1], shared)
    norm1 = Modulation(modulation[:, 1], modulation[:, 0], block.norm1.eps, index=index)
    codes = _fused.coded_input(_parts(block, shared, number).self_attention)
    return _fused.Following(norm1, codes)


def _modulation(
    own: torch.Tensor, temb: torch.Tensor, batch: int, tokens: int, shared: Shared
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The distinct rows of modulation [entries, 6, width] fp32, and which one each token takes (None: the first)."""
    if temb.ndim == 4:
        known = None if torch.compiler.is_compiling() else shared.steps
        if known is not None and known[0].data_ptr() == temb.data_ptr():
            return own + known[1].float(), known[2] if len(known[1]) > 1 else None
        rows = temb.reshape(-1, *temb.shape[2:])
        return own + rows.float(), torch.arange(batch * tokens, dtype=torch.int32, device=temb.device)
    if batch == 1:
        return own + temb.float(), None
    index = torch.arange(batch, dtype=torch.int32, device=temb.device).repeat_interleave(tokens)
    return own + temb.float(), index


def _coded(attention: Any, shared: Shared, number: int) -> _fused.Coded | None:
    """FP8 attention for a block's self-attention, where it was chosen."""
    from wan_runtime.kernels.norm_rope import bounded

    attend = attention.processor.codes
    if attend is None:
        return None
    if torch.compiler.is_compiling() or number not in shared.folded:
        norms = (attention.norm_q, attention.norm_k)
        q, k = (bounded(_fused.weight_of(norm), attention.heads) for norm in norms)
        if torch.compiler.is_compiling():  # its graph is all blocks', so nothing of this one may be in it
            return _fused.Coded(attend, q, k)
        shared.folded[number] = (q, k)
    return _fused.Coded(attend, *shared.folded[number])


def _parts(block: Any, shared: Shared, number: int) -> _fused.Block:
    one, two, ffn = block.attn1, block.attn2, block.ffn
    image = None if two.add_k_proj is None else (two.add_k_proj, two.add_v_proj, two.norm_added_k)
    return _fused.Block(
        self_attention=_fused.SelfAttention(
            one.to_q, one.to_k, one.to_v, one.to_out[0], one.norm_q, one.norm_k, one.heads,
            one.processor.attend, _coded(one, shared, number),
        ),
        cross_attention=_fused.CrossAttention(
            two.to_q, two.to_k, two.to_v, two.to_out[0], two.norm_q, two.norm_k, two.heads,
            two.processor.attend, image,
        ),
        norm2=block.norm2 if isinstance(block.norm2, nn.LayerNorm) else None,
        up=ffn.net[0].proj,
        down=ffn.net[2],
        eps1=block.norm1.eps,
        eps3=block.norm3.eps,
    )  # fmt: skip


def _keys_values(
    part: _fused.CrossAttention, encoder_hidden_states: torch.Tensor, kernels: Any
) -> list[_fused.KeysValues]:
    text, made = encoder_hidden_states, []
    if part.image is not None:
        ahead = text.shape[1] - TEXT_TOKENS
        k, v, norm_k = part.image
        made = [_fused.keys_and_values(k, v, norm_k, part.heads, text[:, :ahead], kernels)]
        text = text[:, ahead:]
    return [_fused.keys_and_values(part.k, part.v, part.norm_k, part.heads, text, kernels), *made]


def _restore(model: nn.Module) -> None:
    unfuse(model)
    uninstall(model)


def _head(model: Any) -> int:
    size: int = model.config.attention_head_dim
    return size


BLOCKS = Blocks(head=_head, attend=install, fuse=fuse, restore=_restore)
