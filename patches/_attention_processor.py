"""diffusers' WAN attention processor with this library's attention in it, for fused and unfused blocks alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_runtime.attention import ENDS, Ends

from ._attending import Attending, name_in_block, said
from ._steps import Steps, unwatch, watch

TEXT_TOKENS = 512


class Processor(Attending):
    """Takes the place of a WanAttnProcessor, and hands back to it what it does not serve: masks, attention that is
    parallel over devices, projections that diffusers merged, and a backend chosen later by `set_attention_backend`.

    replaced  the processor that was there.
    """

    _attention_backend: Any = None  # diffusers writes both
    _parallel_config: Any = None

    def __init__(
        self, name: str, planned_for: tuple[str, torch.dtype], replaced: Any, steps: Steps | None = None
    ) -> None:
        super().__init__(name, planned_for, steps)
        self.replaced = replaced

    @property
    def elsewhere(self) -> bool:
        """Whether the host has set attention up since."""
        return self._attention_backend is not None or self._parallel_config is not None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (
            self.elsewhere
            or attention_mask is not None
            or getattr(attn, "fused_projections", False)
            or kwargs
        ):
            self.replaced._attention_backend = self._attention_backend
            self.replaced._parallel_config = self._parallel_config
            return self.replaced(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
            )
        context, image = encoder_hidden_states, None
        if attn.add_k_proj is not None and context is not None:
            ahead = context.shape[1] - TEXT_TOKENS
            image, context = context[:, :ahead], context[:, ahead:]
        context = hidden_states if context is None else context
        query = _rotated(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), rotary_emb)
        key = _rotated(attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1)), rotary_emb)
        result = self._flat(query, key, attn.to_v(context).unflatten(2, (attn.heads, -1)))
        if image is not None:
            key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
            result = result + self._flat(query, key, attn.add_v_proj(image).unflatten(2, (attn.heads, -1)))
        return attn.to_out[1](attn.to_out[0](result))

    def _flat(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(q, k, v).flatten(2, 3).type_as(q)


def _rotated(x: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Neighbouring pairs of x [batch, tokens, heads, head] turned by diffusers' tables."""
    if rotary is None:
        return x
    cosines, sines = rotary
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def install(
    model: nn.Module, name: str, planned_for: tuple[str, torch.dtype], ends: Ends = ENDS
) -> list[str]:
    """Give every WAN attention of a model this processor, chosen for a device type and a dtype; returns what a user
    should read. `ends` is FP8 attention's."""
    steps, blocks = None, 0
    if name == "fp8":
        embedder: Any = getattr(model, "condition_embedder", None)
        steps = None if embedder is None else watch(model, embedder, ends.steps, sinusoids=False)
    for path, module in model.named_modules():
        replaced = getattr(module, "processor", None)
        if type(replaced).__name__ == "WanAttnProcessor":
            number, count, inner = _place(model, path)
            chosen = name_in_block(name, number, count, ends, inner=inner)
            module.processor = Processor(chosen, planned_for, replaced, steps)
            blocks = blocks or count
    return said(name, blocks, ends)


def _place(model: nn.Module, path: str) -> tuple[int, int, bool]:
    """An attention's block in its stack, the stack's size, and whether it is the block's self-attention (attn1)."""
    stack, number, *rest = path.rsplit(".", 2)
    if not number.isdigit():
        return 0, 0, False
    return int(number), len(list(model.get_submodule(stack).children())), rest == ["attn1"]


def uninstall(model: nn.Module) -> None:
    """Put the host's processors back, with what the host has set on ours since."""
    unwatch(model)
    for module in model.modules():
        ours = getattr(module, "processor", None)
        if isinstance(ours, Processor):
            ours.replaced._attention_backend = ours._attention_backend
            ours.replaced._parallel_config = ours._parallel_config
            module.processor = ours.replaced
