"""The rows of a tile that a program works on at once: R of them, of which the last may be past the end. `left` says how
many there are.

Of what each row has one of (its number, a sum, a table's entry) a kernel holds a column [R, 1], and a number where
there is one row: a number has no layout among the threads, which would compete with the rows' own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column(R: tl.constexpr):
    """The numbers of R rows, int64."""
    return 0 if R == 1 else tl.arange(0, R).to(tl.int64)[:, None]


@triton.jit
def inside(left, columns, WHOLE: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
    """Which of R rows, and of these columns up to WIDTH, there are [R, columns]: no mask in the machine code where it
    is all of them (one row, and WHOLE columns)."""
    rows = (tl.arange(0, R) < left) | tl.full((R,), R == 1, tl.int1)
    within = (columns < WIDTH) | tl.full(columns.shape, WHOLE, tl.int1)
    return rows[:, None] & within[None, :]


@triton.jit
def store_column(at, left, values, R: tl.constexpr):
    """Write one value a row, side by side."""
    if R == 1:
        tl.store(at, values)
    else:
        rows = tl.arange(0, R)[:, None]
        tl.store(at + rows, values, mask=rows < left)
