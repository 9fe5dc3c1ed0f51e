"""A model's text embedding, made once a prompt: it depends on the prompt and the embedder's weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from wan_runtime.residents import Move, OwnDtype, become, original_class, restore

from ._hooks import hooked
from ._shared import PROMPTS, same
from ._snapshot import Snapshot, tracked
from ._unfusable import traced

MEMO = "_wan_runtime_texts"  # on a text embedder: its Texts


class Texts:
    """The last PROMPTS prompts [batch, tokens, width], their embeddings, and what these were made with: weights, and
    the dtype of an autocast or None. A copy or a pickle of it starts empty."""

    def __init__(self) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor, Snapshot, torch.dtype | None]] = []

    def __reduce__(self) -> tuple[type[Texts], tuple[()]]:
        return type(self), ()

    def embedded(
        self,
        text: torch.Tensor,
        weights: Sequence[torch.Tensor],
        autocast: torch.dtype | None,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """What `make` gives for a prompt, which is compared by value (on a GPU that waits for it). The caller may
        write into it."""
        known = [entry for entry in self.kept if entry[2].matches(weights) and entry[3] == autocast]
        found = next((entry for entry in known if same(entry[0], text)), None)
        if found is None:
            found = (text.detach().clone(), make().detach(), Snapshot(weights), autocast)
        self.kept = [found, *(entry for entry in known if entry is not found)][:PROMPTS]
        return found[1].clone()


class FusedText(OwnDtype):
    """The condition embedder's text part in diffusers, `text_embedding` under the original names."""

    def forward(self, text: torch.Tensor) -> Any:
        forward = super().forward
        parameters = tuple(self.parameters())
        if torch.compiler.is_compiling() or traced((text, *parameters)) is not None or not _decides(self):
            return forward(text)
        kind = text.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        texts: Texts = self.__dict__[MEMO]
        return texts.embedded(text, parameters, autocast, lambda: forward(text))

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
    ) and tracked(embedder.parameters())


def fuse(embedder: nn.Module) -> None:
    """Remember the prompts of an embedder from now on."""
    become(embedder, FusedText)
    embedder.__dict__[MEMO] = Texts()


def unfuse(module: nn.Module) -> None:
    """Undo `fuse`, of a module that it was done to."""
    if module.__dict__.pop(MEMO, None) is not None:
        restore(module)
