"""Which attention q, k and v are given to: the one that was chosen, or bf16's where FP8 would show or not pay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from wan_runtime.attention import ATTENTIONS, Ends
from wan_runtime.autograd import gradient_wanted

from . import _fused
from ._shared import Folded, Shared
from ._snapshot import held
from ._steps import Steps

BESIDE_FP8 = "fa3"
SHORT = 1024  # keys; below, quantising v takes as long as the FP8 kernel saves


class Attending:
    """One attention of a model.

    name         a member of wan_runtime.attention.
    planned_for  the device type and the dtype it was chosen for; a model that was moved since gets torch's SDPA, and so
                 does one that is trained, where the chosen one has no gradient.
    steps        with FP8 attention, where the model is in a generation; None: in no end.
    codes        the attention on e4m3 codes, where it takes them; see Attention.codes.
    """

    def __init__(self, name: str, planned_for: tuple[str, torch.dtype], steps: Steps | None = None) -> None:
        self.name, self.planned_for, self.steps = name, planned_for, steps
        # Looked up here: a forward must not search the catalogue, and torch.compile cannot.
        chosen = ATTENTIONS[name]
        self._attend, self._elsewhere = chosen.attend, ATTENTIONS["sdpa"].attend
        self._beside = chosen.attend if chosen.codes is None else ATTENTIONS[BESIDE_FP8].attend
        self.codes, self._trains = chosen.codes, chosen.trains

    def takes_codes(self, keys: int) -> bool:
        """Whether a call with so many keys is to be computed in FP8 now."""
        return self.codes is not None and keys >= SHORT and not (self.steps is not None and self.steps.at_end)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [batch, tokens, heads, head] -> [batch, tokens, heads, head]."""
        device, dtype = self.planned_for
        planned = q.device.type == device and q.dtype in (dtype, torch.bfloat16)  # FP8 products are bf16
        if not planned or (not self._trains and gradient_wanted((q, k, v))):
            return self._elsewhere(q, k, v)
        return (self._attend if self.takes_codes(k.shape[1]) else self._beside)(q, k, v)

    def coded(
        self, norm_q: nn.Module, norm_k: nn.Module, heads: int, tokens: int, shared: Shared, number: int
    ) -> _fused.Coded | None:
        """FP8 attention for a block's self-attention, or None where this forward's is not FP8."""
        from wan_runtime.kernels.norm_rope import bounded

        if not self.takes_codes(tokens):
            return None
        attend: Callable[..., torch.Tensor] | None = self.codes
        assert attend is not None

        def make() -> tuple[Folded, Folded]:
            return bounded(_fused.weight_of(norm_q), heads), bounded(_fused.weight_of(norm_k), heads)

        if torch.compiler.is_compiling():  # its graph is all blocks', so nothing of this one may be in it
            return _fused.Coded(attend, *make())
        return _fused.Coded(attend, *shared.folded_norms(number, held(norm_q, norm_k), make))


def name_in_block(name: str, number: int, count: int, ends: Ends, *, inner: bool) -> str:
    """The attention of a block's self-attention (`inner`) or cross-attention, of `count` blocks: FP8 is for
    self-attention, and not in the blocks at either end of a stack."""
    if name == "fp8" and not (inner and ends.blocks <= number < count - ends.blocks):
        return BESIDE_FP8
    return name


def said(name: str, blocks: int, ends: Ends) -> list[str]:
    """What a user reads of FP8 attention's ends, for a stack of so many blocks."""
    if name != "fp8":
        return []
    inner = max(blocks - 2 * ends.blocks, 0)
    kept = "".join(
        f"the first and last {one if count == 1 else f'{count} {one}s'}, "
        for count, one in ((ends.blocks, "block"), (ends.steps, "step"))
        if count
    )
    return [
        f"attention: FP8 in the self-attention of {inner} of {blocks} blocks; bf16 ({BESIDE_FP8}) in "
        f"{kept}cross-attention, under a mask, and for fewer than {SHORT} tokens."
    ]
