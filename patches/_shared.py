"""What the fused blocks of one model share from one forward to the next: caches, and nothing that a copy must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from wan_runtime.autograd import writes

from ._called import number
from ._fused import KeysValues
from ._snapshot import Snapshot, Version, tracked
from ._stream import Begun

Modulation = tuple[torch.Tensor, torch.Tensor | None]  # what _modulation.rows_of gives
Folded = tuple[torch.Tensor, torch.Tensor]  # what norm_rope.bounded gives
Made = TypeVar("Made")
PROMPTS = 2  # a guided step asks for two: the prompt and the negative prompt


class Prompt:
    """One context [batch, tokens, width], and what each block made of it, with which weights."""

    def __init__(self, context: torch.Tensor) -> None:
        self.context = context.detach().clone()  # compared by value: the host may write into its own
        self.made: dict[int, tuple[Snapshot, list[KeysValues]]] = {}

    def is_of(self, context: torch.Tensor) -> bool:
        return same(self.context, context)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are alike in shape, dtype, device and every value."""
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)


@dataclass(frozen=True)
class Carried:
    """What a block has made for the one after it: its `modulation` of `temb`, and what it has `begun` with that, of the
    `stream` that the block gave."""

    stream: Version
    temb: Version
    modulation: Modulation
    begun: Begun

    def is_for(self, stream: torch.Tensor, temb: torch.Tensor) -> bool:
        """Whether a block is given what it was made for, and nothing has been written into that since."""
        return self.stream.is_of(stream) and self.temb.is_of(temb)


class Expanded:
    """A modulation that was expanded to every token, by its distinct `rows` [k, 6, width] and which of them each token
    takes, `index` int32. It does not keep the expanded one, which is large: 1 GB of TI2V-5B at 720p."""

    def __init__(self, expanded: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> None:
        self._storage = StorageWeakRef(expanded.untyped_storage())
        self._place = _place(expanded)
        self.rows, self.index = rows, index

    def is_of(self, steps: torch.Tensor) -> bool:
        """Whether a tensor is the expanded one, unwritten, or the whole of it in another shape."""
        return not self._storage.expired() and self._place == _place(steps)


def _place(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), writes(tensor)


class Shared:
    """Caches of one model. A copy or a pickle of it starts empty.

    prompts  K and V of the last prompts, a block: they depend on the prompt and the weights alone.
    rotary   the host's tables, and the one made of them, kept while the host hands out the same.
    folded   weights of norms with FP8 attention's static scales in them, a block, and what they were made of.
    blocks   the blocks, by their number; they say so themselves, so that a copy's are the copy's.
    carried  what a block has made for the block of a number. Where that is given another stream (a host may add to it,
             or leave blocks out) it is made in vain, each time: no result may hang on what was run before.
    steps    the distinct timesteps' modulation of this forward, where the host expands it to every token.
    cast     this forward's modulation, and the same in fp32.
    """

    def __init__(self) -> None:
        self.blocks: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
        self.clear()

    def clear(self) -> None:
        """Forget everything: weights moved or changed."""
        self.prompts: list[Prompt] = []
        self.current: tuple[Version, Prompt] | None = None
        self.folded: dict[int, tuple[Snapshot, tuple[Folded, Folded]]] = {}
        self.rotary: tuple[Version, Version, torch.Tensor] | None = None
        self.carried: dict[int, Carried] = {}
        self.steps: Expanded | None = None
        self.cast: tuple[Version, torch.Tensor] | None = None

    def begin(self) -> None:
        """A forward begins: what was known by identity alone is no longer."""
        self.current = None
        self.steps = None
        self.cast = None
        self.carried = {}

    def in_fp32(self, steps: torch.Tensor) -> torch.Tensor:
        """This forward's modulation in fp32, cast once for all blocks."""
        # Compiled there are no identities to tell it by, and in inference mode no versions.
        if steps.dtype == torch.float32 or torch.compiler.is_compiling() or steps.is_inference():
            return steps.float()
        if self.cast is None or not self.cast[0].is_of(steps):
            self.cast = (Version(steps), steps.float())
        return self.cast[1]

    def take(self, number: int, stream: torch.Tensor, temb: torch.Tensor) -> Carried | None:
        """What was carried to a block, or None where there is nothing for what it was given."""
        carried = self.carried.pop(number, None)
        return carried if carried is not None and carried.is_for(stream, temb) else None

    def carry(
        self, number: int, stream: torch.Tensor, temb: torch.Tensor, modulation: Modulation, begun: Begun
    ) -> None:
        """Keep what is begun of `stream` for the block of a number."""
        self.carried[number] = Carried(Version(stream), Version(temb), modulation, begun)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.blocks = WeakValueDictionary()
        self.clear()

    def keys_values(
        self,
        block: int,
        context: torch.Tensor,
        weights: Sequence[torch.Tensor],
        make: Callable[[], list[KeysValues]],
    ) -> list[KeysValues]:
        """What `make` gives for a block's weights and a context, remembered for the last PROMPTS contexts.

        The first block of a forward compares the context by value (on a GPU that waits for it, once a forward).
        """
        if not tracked(weights):
            return make()
        if self.current is None or not self.current[0].is_of(context):
            self.current = (Version(context), self._prompt(context))
        return _remembered(self.current[1].made, block, weights, make)

    def folded_norms(
        self, block: int, weights: Sequence[torch.Tensor], make: Callable[[], tuple[Folded, Folded]]
    ) -> tuple[Folded, Folded]:
        """What `make` gives for the weights of a block's norms, remembered."""
        return _remembered(self.folded, block, weights, make) if tracked(weights) else make()

    def _prompt(self, context: torch.Tensor) -> Prompt:
        found = next((prompt for prompt in self.prompts if prompt.is_of(context)), None) or Prompt(context)
        self.prompts = [found, *(prompt for prompt in self.prompts if prompt is not found)][:PROMPTS]
        return found

    def rotary_table(self, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """diffusers' tables [1, tokens, 1, head], each value twice -> norm_rope's [tokens, head] fp32."""
        if torch.compiler.is_compiling():
            return _table(cosines, sines)
        if self.rotary is None or not self.rotary[0].is_of(cosines) or not self.rotary[1].is_of(sines):
            self.rotary = (Version(cosines), Version(sines), _table(cosines, sines))
        return self.rotary[2]


def _remembered(
    made: dict[int, tuple[Snapshot, Made]],
    block: int,
    weights: Sequence[torch.Tensor],
    make: Callable[[], Made],
) -> Made:
    """What was made of a block's weights, made anew where they are no longer what they were."""
    kept = made.get(block)
    if kept is None or not kept[0].matches(weights):
        kept = made[block] = (Snapshot(weights), make())
    return kept[1]


def announce(block: nn.Module, shared: Shared, at: int) -> None:
    """Make a block, or a copy of one, known to those that it shares with, and to compiled graphs."""
    shared.blocks[at] = block
    number(block)


def _table(cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    return torch.cat((cosines[0, :, 0, 0::2], sines[0, :, 0, 1::2]), 1).float().contiguous()
