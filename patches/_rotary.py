"""norm_rope's tables from the complex rotations of hosts under the original names, and diffusers' tables, made once a
clip's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._snapshot import Snapshot, Version

Tables = tuple[torch.Tensor, torch.Tensor]  # cosines and sines

KEPT = 4  # sizes; a table is head * tokens * 4 bytes, 39 MB for 14B at 720p


def table_of(turns: torch.Tensor) -> torch.Tensor:
    """Complex rotations [tokens, head / 2] -> cosines, then sines: [tokens, head] fp32."""
    return torch.cat((turns.real, turns.imag), 1).float().contiguous()


def of_grid(grid: tuple[int, int, int], freqs: torch.Tensor) -> torch.Tensor:
    """The release's rotations [positions, head / 2] of a clip of (frames, rows, columns) -> its table."""
    half = freqs.shape[1]
    axes = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    turns = [
        axis[:size].view(*(-1 if at == number else 1 for at in range(3)), axis.shape[1]).expand(*grid, -1)
        for number, (size, axis) in enumerate(zip(grid, axes, strict=True))
    ]
    return table_of(torch.cat(turns, 3).flatten(0, 2))


class Rotations:
    """Tables that a model has asked for. A copy or a pickle of it starts empty."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, int, int], torch.Tensor] = {}
        self.freqs: Version | None = None
        self.given: tuple[Version, Version, tuple[int, int, int] | str] | None = None

    def __reduce__(self) -> tuple[type[Rotations], tuple[()]]:
        return type(self), ()

    def of_clip(
        self, tokens: int, seq_lens: torch.Tensor, grid_sizes: torch.Tensor, freqs: torch.Tensor
    ) -> torch.Tensor | str:
        """The release's arguments -> the table for `tokens` tokens, or why there is none, in words.

        seq_lens [batch] and grid_sizes [batch, 3] are read once a forward: every block is given the same tensors.
        """
        given = self.given
        if given is None or not given[0].is_of(seq_lens) or not given[1].is_of(grid_sizes):
            given = self.given = (Version(seq_lens), Version(grid_sizes), _grid(seq_lens, grid_sizes))
        grid = given[2]
        if isinstance(grid, str):
            return grid
        if math.prod(grid) != tokens:
            return "part of the tokens are padding"  # said once, so without their number
        if self.freqs is None or not self.freqs.is_of(freqs):
            self.freqs, self.tables = Version(freqs), {}
        if grid not in self.tables:
            while len(self.tables) >= KEPT:
                del self.tables[next(iter(self.tables))]
            self.tables[grid] = of_grid(grid, freqs)
        return self.tables[grid]

    def of_tokens(self, freqs: torch.Tensor) -> torch.Tensor:
        """DiffSynth's rotations, already laid out a token [tokens, 1, head / 2] -> their table."""
        if torch.compiler.is_compiling():
            return table_of(freqs[:, 0])
        if self.freqs is None or not self.freqs.is_of(freqs):
            self.freqs, self.tables = Version(freqs), {(0, 0, 0): table_of(freqs[:, 0])}
        return self.tables[(0, 0, 0)]


class SizeTables:
    """What diffusers' rotary embedding gave last: of a clip's size and device, and with which buffers. A copy or a
    pickle of it starts empty."""

    def __init__(self) -> None:
        self.kept: tuple[tuple[Any, ...], Snapshot, Tables, list[Version]] | None = None

    def __reduce__(self) -> tuple[type[SizeTables], tuple[()]]:
        return type(self), ()

    def tables(
        self, of: tuple[Any, ...], buffers: Sequence[torch.Tensor], make: Callable[[], Tables]
    ) -> Tables:
        """What `make` gives, remembered until a size or a device is another, or a buffer or the tables are written: it
        is the tables themselves that whoever asks is given."""
        kept = self.kept
        if kept is None or kept[0] != of or not kept[1].matches(buffers) or not _as_made(kept[2], kept[3]):
            # Clones: torch.compile guards the strides of what a view is of, and would compile once more for a width.
            cosines, sines = make()
            made = (cosines.clone(), sines.clone())
            kept = self.kept = (of, Snapshot(buffers), made, [Version(table) for table in made])
        return kept[2]


def _as_made(tables: Tables, versions: Sequence[Version]) -> bool:
    """Whether tables may be given again: nobody wrote into them, and what was made in inference mode is not wanted
    outside of it, where autograd may have to save it."""
    if tables[0].is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(version.is_of(table) for table, version in zip(tables, versions, strict=True))


def _grid(seq_lens: torch.Tensor, grid_sizes: torch.Tensor) -> tuple[int, int, int] | str:
    """The size that all clips of a batch have, or why there is none."""
    grids = {tuple(row) for row in grid_sizes.tolist()}
    if len(grids) != 1:
        return "the clips of a batch differ in size"
    frames, rows, columns = grids.pop()
    if set(seq_lens.tolist()) != {frames * rows * columns}:
        return "its sequences are shorter or longer than their clips"
    return frames, rows, columns
