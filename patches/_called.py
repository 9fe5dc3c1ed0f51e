"""Leaves that an adapter wraps, in compiled blocks: torch.compile sees an operator that calls them as they are then.

What an adapter does hangs on Python values (on or off, its weight), each of which would be a graph of its own. The
operator is told the block by a number in a tensor, so that all blocks share their graph.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn

KEY = "_wan_runtime_number"  # on a fused block: its number, int64 [] on the CPU
_BLOCKS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def number(block: nn.Module) -> None:
    """Give a block, or a copy of one, a number of its own."""
    own = next(_NUMBERS)
    block.__dict__[KEY] = torch.tensor(own, device="cpu")
    _BLOCKS[own] = block


class Leaf:
    """A wrapped linear of a block, as something to call."""

    def __init__(self, block: nn.Module, path: str, out_features: int) -> None:
        self.block, self.path, self.out_features = block, path, out_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        result: torch.Tensor = _call(x, self.block.__dict__[KEY], self.path, self.out_features, dtype)
        return result


def leaf(block: nn.Module, path: str, module: Any) -> Any:
    """A linear of a block, which is at a path in it, as a forward should call it."""
    if not torch.compiler.is_compiling() or not hasattr(module, "base_layer"):
        return module
    base = module.base_layer
    while hasattr(base, "base_layer"):
        base = base.base_layer
    return Leaf(block, path, base.out_features)


@torch.library.custom_op("wan_runtime::wrapped_linear", mutates_args=())
def _call(
    x: torch.Tensor, key: torch.Tensor, path: str, out_features: int, dtype: torch.dtype
) -> torch.Tensor:
    result: torch.Tensor = _BLOCKS[int(key)].get_submodule(path)(x)
    return result.to(dtype)


@_call.register_fake
def _(x: torch.Tensor, key: torch.Tensor, path: str, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
