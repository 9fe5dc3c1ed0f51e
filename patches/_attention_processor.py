"""diffusers' WAN attention processor with this library's attention in it, for fused and unfused blocks alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_runtime.attention import ATTENTIONS

TEXT_TOKENS = 512
ENDS = 2  # blocks at either end of a stack whose attention stays bf16 under attention="fp8"
BESIDE_FP8 = "fa3"


class Processor:
    """Takes the place of a WanAttnProcessor, and hands back to it what it does not serve: masks, attention that is
    parallel over devices, projections that diffusers merged, and a backend chosen later by `set_attention_backend`.

    name         a member of wan_runtime.attention.
    planned_for  the device type and the dtype it was chosen for; a model that was moved since gets torch's SDPA.
    replaced     the processor that was there.
    """

    _attention_backend: Any = None  # diffusers writes both
    _parallel_config: Any = None

    def __init__(self, name: str, planned_for: tuple[str, torch.dtype], replaced: Any) -> None:
        self.name, self.planned_for, self.replaced = name, planned_for, replaced
        chosen = ATTENTIONS[
            name
        ]  # looked up here: a forward must not search the catalogue, and torch.compile cannot
        self._attend, self._elsewhere = chosen.attend, ATTENTIONS["sdpa"].attend
        self.codes = (
            chosen.codes
        )  # the same on e4m3 codes, where this attention takes them; see Attention.codes

    @property
    def elsewhere(self) -> bool:
        """Whether the host has set attention up since."""
        return self._attention_backend is not None or self._parallel_config is not None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [batch, tokens, heads, head] -> [batch, tokens, heads, head]."""
        device, dtype = self.planned_for
        planned = q.device.type == device and q.dtype in (dtype, torch.bfloat16)  # FP8 products are bf16
        return (self._attend if planned else self._elsewhere)(q, k, v)

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


def install(model: nn.Module, name: str, planned_for: tuple[str, torch.dtype]) -> None:
    """Give every WAN attention of a model this processor, chosen for a device type and a dtype.

    FP8 attention is for self-attention, and not in the first and last ENDS blocks of a stack, where it shows most.
    """
    for path, module in model.named_modules():
        replaced = getattr(module, "processor", None)
        if type(replaced).__name__ == "WanAttnProcessor":
            chosen = BESIDE_FP8 if name == "fp8" and not _inner(model, path) else name
            module.processor = Processor(chosen, planned_for, replaced)


def _inner(model: nn.Module, path: str) -> bool:
    """Whether an attention is a self-attention (attn1) away from both ends of its list of blocks."""
    stack, number, *rest = path.rsplit(".", 2)
    if rest != ["attn1"] or not number.isdigit():
        return False
    return ENDS <= int(number) < len(list(model.get_submodule(stack).children())) - ENDS


def uninstall(model: nn.Module) -> None:
    """Put the host's processors back, with what the host has set on ours since."""
    for module in model.modules():
        ours = getattr(module, "processor", None)
        if isinstance(ours, Processor):
            ours.replaced._attention_backend = ours._attention_backend
            ours.replaced._parallel_config = ours._parallel_config
            module.processor = ours.replaced
