"""The residual stream inside a fused block, and how a product is added to it.

Where a product adds itself to what is there (wan_runtime.backends.Added), no pass over the stream does, and the next
norm only reads it. Its bias does not come along, as a product would round it to 16 bits: the biases that the values
lack are kept beside them, in fp32, until the block ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wan_runtime.backends import Added
from wan_runtime.kernels._codes import Codes
from wan_runtime.linear import QuantLinear
from wan_runtime.residents import kind_of, served

from ._hooks import hooked


@dataclass(frozen=True)
class Stream:
    """The residual stream: `values` [tokens, width], contiguous, and the `offset` [width] fp32 that they lack, or None.

    ours   nobody else reads `values`: they may be written to. Only such values lack an offset.
    whole  the same with the offset in it, which somebody else holds, or None.
    """

    values: torch.Tensor
    offset: torch.Tensor | None = None
    ours: bool = False
    whole: torch.Tensor | None = None


@dataclass(frozen=True)
class Begun:
    """What a block has made for the one after it: Rows of the first norm, and a Stream that is ours to go on with, or
    None where there is the host's alone."""

    rows: Any
    stream: Stream | None


@dataclass(frozen=True)
class Following:
    """The first norm of the block that comes next, a kernels' Modulation, and how its products take their input."""

    norm1: Any
    codes: Codes


def multiply(module: nn.Module, rows: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear's product, and the bias that is still to be added to it (fp32), or None where it is in already."""
    if rows.scale is None:
        if kind_of(module) == "linear" and not served(module) and hooked(module) is None:
            product: Any = module.product
            return product(rows.values), module._parameters["bias"]
        return module(rows.values), None
    assert isinstance(module, QuantLinear) and module.coded is not None
    return module.coded(rows.values, rows.scale, module.slots, rows.whole), module.bias


def add(
    stream: Stream, module: nn.Module, rows: Any, gate: torch.Tensor | None, index: torch.Tensor | None, after: Any,
    codes: Codes, kernels: Any,
) -> tuple[Stream, Any]:  # fmt: skip
    """The stream with gate * module(rows) added, which is ours, and what the norm `after` makes of it (None: nothing).

    gate and index are residual_norm's; index also says that the block's tokens do not all take one gate.
    """
    added = _added(stream, module, rows, index)
    if added is None:
        total, made = _summed(stream, module, rows, gate, index, after, codes, kernels)
        return Stream(total, ours=True), made
    stream = _grown(stream, added, module, rows, gate)
    if after is None:
        return stream, None
    return stream, kernels.norm_modulate(stream.values, after, codes, offset=stream.offset)


def end(
    stream: Stream, module: nn.Module, rows: Any, gate: torch.Tensor, index: torch.Tensor | None,
    following: Following | None, kernels: Any,
) -> tuple[torch.Tensor, Begun | None]:  # fmt: skip
    """The stream after a block's last product, for the host, and what the block after it begins with."""
    norm1, codes = (None, Codes.PLAIN) if following is None else (following.norm1, following.codes)
    added = _added(stream, module, rows, index)
    if added is None:
        total, made = _summed(stream, module, rows, gate, index, norm1, codes, kernels)
        return total, None if following is None else Begun(made, None)
    stream = _grown(stream, added, module, rows, gate)
    into = stream.values if following is None else None
    total, made = kernels.residual_norm(
        stream.values, stream.offset, None, None, None, norm1, codes, into=into
    )
    if following is None:
        return total, None
    return total, Begun(made, Stream(stream.values, stream.offset, ours=True, whole=total))


def settled(stream: Stream, kernels: Any) -> Stream:
    """The same stream without an offset."""
    if stream.offset is None:
        return stream
    if stream.whole is not None:
        return Stream(stream.whole)
    total, _ = kernels.residual_norm(
        stream.values, stream.offset, None, None, None, None, Codes.PLAIN, into=stream.values
    )
    return Stream(total, ours=True)


def _added(stream: Stream, module: nn.Module, rows: Any, index: torch.Tensor | None) -> Added | None:
    """How this product adds itself to the stream, or None."""
    # A compiler cannot follow it.
    if rows.scale is None or index is not None or not stream.ours or torch.compiler.is_compiling():
        return None
    assert isinstance(module, QuantLinear)
    return module.added if module.added is not None and module.added.takes(stream.values) else None


def _grown(stream: Stream, added: Added, module: nn.Module, rows: Any, gate: torch.Tensor | None) -> Stream:
    """The stream with a product in its values and the product's bias in its offset."""
    assert isinstance(module, QuantLinear)
    factor = None if gate is None else gate[0]
    added.add(rows.values, rows.scale, module.slots, factor, stream.values)
    offset, bias = stream.offset, module.bias
    if bias is not None and factor is not None:
        offset = factor * bias if offset is None else torch.addcmul(offset, factor, bias)
    elif bias is not None:
        offset = bias if offset is None else offset + bias
    return Stream(stream.values, offset, ours=True)


def _summed(
    stream: Stream, module: nn.Module, rows: Any, gate: torch.Tensor | None, index: torch.Tensor | None, after: Any,
    codes: Codes, kernels: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """The sum by a pass over the product and the stream: into the stream where that is ours."""
    y, bias = multiply(module, rows)
    stream = settled(stream, kernels)
    into = stream.values if stream.ours else None
    total, made = kernels.residual_norm(y, bias, gate, stream.values, index, after, codes, into=into)
    return total, made
