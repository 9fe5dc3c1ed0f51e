"""A block's modulation as the distinct rows that a fused forward takes, and which of them each token takes."""

from __future__ import annotations

import torch

from ._shared import Expanded, Shared

Rows = tuple[torch.Tensor, torch.Tensor | None]


def distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [n, ...] -> (where each distinct one is first found [k], which of them each row is [n] int32).

    Neighbours are compared first: tokens of one timestep lie side by side, so that little is left to sort.
    """
    flat = rows.reshape(len(rows), -1)
    changed = (flat[1:] != flat[:-1]).any(1)
    at = torch.cat((changed.new_zeros(1, dtype=torch.long), changed.nonzero()[:, 0] + 1))
    run = torch.cat((changed.new_zeros(1, dtype=torch.long), changed.long().cumsum(0)))
    if len(at) > 1:
        different, inverse = torch.unique(flat[at], dim=0, return_inverse=True)
        first = inverse.new_full((len(different),), len(at))
        first.scatter_reduce_(0, inverse, torch.arange(len(at), device=at.device), "amin")
        at, run = at[first], inverse[run]
    return at, run.to(torch.int32)


def rows_of(own: torch.Tensor, steps: torch.Tensor, batch: int, tokens: int, shared: Shared) -> Rows:
    """The distinct rows of modulation [entries, 6, width] fp32, and which one each token takes (None: the first).

    own    the block's own [1, 6, width] fp32.
    steps  what the host made of the timesteps: [batch or 1, 6, width], or [batch or 1, tokens or 1, 6, width].
    """
    if steps.ndim == 4 and steps.shape[1] == 1:
        steps = steps[:, 0]
    if steps.ndim == 3:
        if len(steps) == 1:
            return own + shared.in_fp32(steps), None
        index = torch.arange(batch, dtype=torch.int32, device=steps.device).repeat_interleave(tokens)
        return own + shared.in_fp32(steps), index
    if torch.compiler.is_compiling():
        rows = steps.expand(batch, -1, -1, -1).flatten(0, 1)
        return own + rows.float(), torch.arange(len(rows), dtype=torch.int32, device=steps.device)
    known = shared.steps
    if known is None or not known.is_of(steps):
        at, index = distinct(steps.flatten(0, 1))
        known = shared.steps = Expanded(steps, steps.flatten(0, 1)[at], index)
    rows, index = known.rows, known.index
    if len(rows) == 1:
        return own + shared.in_fp32(rows), None
    return own + shared.in_fp32(rows), index if len(index) == batch * tokens else index.repeat(batch)
