"""How the row kernels are launched: which tokens a program takes, and with how much of the GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import triton

from wan_runtime.formats._mx import BLOCK

SHARED = 96 * 1024  # bytes of shared memory that a program has on every GPU with FP8 products


@dataclass(frozen=True)
class Launch:
    """How a row kernel is launched: nothing of it changes a result.

    rows       tokens a program takes, `tile` after `tile`; what every row needs (biases, modulation) is read once and
               kept in registers.
    warps      a program's, at most: tiles that are small take fewer.
    stages     tiles that are on their way from memory at a time, in shared memory and not in registers; fewer where
               they would not fit.
    registers  the most a thread may hold, or None for the compiler's choice; fewer let more programs run side by side.
    tile       tokens that a program works on at once, a power of two: narrow rows alone leave it waiting.
    """

    rows: int = 16
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    tile: int = 1

    def grid(self, tokens: int) -> tuple[int]:
        """The programs for so many tokens."""
        return (-(-tokens // self.rows),)

    def constants(self, width: int, read: int) -> Mapping[str, int | None]:
        """What a kernel is compiled for, of rows for which `read` bytes an element are read.

        A row is held in two parts, powers of two as Triton wants them: 5120 is 4096 and 1024, where one part would be
        8192 and do 1.6 times the work.
        """
        return _constants(self, width, read, False)

    def constants_of_three(self, width: int, read: int) -> Mapping[str, int | None]:
        """The same in three parts, for wide rows that do much with each value: 13824 is 8192, 4096 and 2048."""
        return _constants(self, width, read, True)


@functools.cache  # it is asked at every launch
def _constants(launch: Launch, width: int, read: int, three: bool) -> Mapping[str, int | None]:
    a, rest = (width // 2, width // 2) if three and width <= BLOCK else first_part(width)
    parts = {"A": a}
    if three:
        parts["B"], rest = first_part(rest)
    parts["C" if three else "B"] = triton.next_power_of_2(rest or BLOCK)
    # The tile that is worked on is in registers, and passes through shared memory in fp32 where it is of many rows.
    free = SHARED - (launch.tile * a * 4 if launch.tile > 1 else 0)
    ahead = max(free, 0) // (sum(parts.values()) * read * launch.tile)
    warps = max(triton.next_power_of_2(width) * launch.tile // 256, 1)
    return {
        **parts,
        "WIDTH": width,
        "R": launch.tile,
        "STAGES": min(ahead + 1, launch.stages),
        "num_warps": min(warps, launch.warps),
        "maxnreg": launch.registers,
    }


def launch_at(measured: Mapping[int, Launch], width: int) -> Launch:
    """The launch for rows of a width, of those that were measured at some widths: that of the next wider, or of the
    widest where none is as wide."""
    wider = [known for known in measured if known >= width]
    return measured[min(wider) if wider else max(measured)]


def first_part(width: int) -> tuple[int, int]:
    """The largest power of two below a width of at least 2, and what is left; one block of 32 stays whole."""
    if width == BLOCK:
        return width, 0
    part = 1 << ((width - 1).bit_length() - 1)
    return part, width - part
