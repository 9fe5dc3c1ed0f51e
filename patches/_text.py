"""A model's text embedding, made once a prompt: it depends on the prompt and the embedder's weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wan_runtime.residents import Move, OwnDtype, become, original_class, restore

from ._hooks import hooked
from ._shared import PROMPTS, same
from ._unfusable import traced

MEMO = "_wan_runtime_texts"  # on a text embedder: its Texts


@dataclass(frozen=True)
class State:
    """What decides an embedding beside the prompt.

    parameters  the embedder's own, held so that no other can take their place in `seen`.
    seen        of each: which it is, where its values lie, and how often torch has seen them written.
    autocast    the dtype of an autocast that is on, or None.
    """

    parameters: tuple[nn.Parameter, ...]
    seen: tuple[tuple[int, int, int], ...]
    autocast: torch.dtype | None

    def is_as(self, other: State) -> bool:
        return (self.seen, self.autocast) == (other.seen, other.autocast)


class Texts:
    """The last PROMPTS prompts [batch, tokens, width] and their embeddings. A copy or a pickle of it starts empty."""

    def __init__(self) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor, State]] = []

    def __reduce__(self) -> tuple[type[Texts], tuple[()]]:
        return type(self), ()

    def embedded(self, text: torch.Tensor, state: State, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives for a prompt, which is compared by value (on a GPU that waits for it). The caller may
        write into it."""
        known = [entry for entry in self.kept if entry[2].is_as(state)]
        found = next((entry for entry in known if same(entry[0], text)), None)
        if found is None:
            found = (text.detach().clone(), make().detach(), state)
        self.kept = [found, *(entry for entry in known if entry is not found)][:PROMPTS]
        return found[1].clone()


class FusedText(OwnDtype):
    """The condition embedder's text part in diffusers, `text_embedding` under the original names."""

    def forward(self, text: torch.Tensor) -> Any:
        forward = super().forward
        parameters = tuple(self.parameters())
        if torch.compiler.is_compiling() or traced((text, *parameters)) is not None or not _decides(self):
            return forward(text)
        seen = tuple((id(p), p.data_ptr(), p._version) for p in parameters)
        kind = text.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        texts: Texts = self.__dict__[MEMO]
        return texts.embedded(text, State(parameters, seen, autocast), lambda: forward(text))

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.__dict__[MEMO] = Texts()
        return super()._apply(fn, recurse)


def _decides(embedder: nn.Module) -> bool:
    """Whether an embedder's weights alone decide: no adapter, no hook, no other forward, and every write is seen."""
    return all(
        hooked(part) is None
        and (part is embedder or not part._modules)  # what an adapter wraps has parts of its own
        and (not part._parameters or original_class(part) is nn.Linear)
        for part in embedder.modules()
    ) and not any(parameter.is_inference() for parameter in embedder.parameters())


def fuse(embedder: nn.Module) -> None:
    """Remember the prompts of an embedder from now on."""
    become(embedder, FusedText)
    embedder.__dict__[MEMO] = Texts()


def unfuse(module: nn.Module) -> None:
    """Undo `fuse`, of a module that it was done to."""
    if module.__dict__.pop(MEMO, None) is not None:
        restore(module)
