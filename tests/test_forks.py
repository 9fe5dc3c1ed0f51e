"""Which blocks under the original names are taken for the release's: a fork keeps its own forward and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wan_runtime
from tests.hosts import original
from wan_runtime.errors import BackendUnavailable, InvalidOption
from wan_runtime.patches import _original_block


class Scaled(original.WanAttentionBlock):
    def forward(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * scale


class Narrowed(original.WanSelfAttention):
    pass


def _subclassed(model: Any) -> None:
    """As the release's own speech-to-video model does, with the same arguments."""
    model.blocks[1].__class__ = type("WanS2VAttentionBlock", (original.WanAttentionBlock,), {})


def _forked(model: Any) -> None:
    model.blocks[1].__class__ = type("WanAttentionBlock", (Scaled,), {})


def _attention(model: Any) -> None:
    model.blocks[0].self_attn.__class__ = Narrowed


def _longer(model: Any) -> None:
    model.blocks[1].audio_attn = torch.nn.Linear(2, 2)


def _window(model: Any) -> None:
    model.blocks[0].self_attn.window_size = (4, 4)


def _relu(model: Any) -> None:
    model.blocks[0].ffn[1] = torch.nn.ReLU()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_subclassed, "its blocks are WanS2VAttentionBlock"),
        (_forked, "the forward of its WanAttentionBlock takes args, scale, kwargs"),
        (_attention, "its attention is a Narrowed"),
        (_longer, "more or fewer parts than the release's: audio_attn"),
        (_window, "window"),
        (_relu, "tanh GELU"),
    ],
)
def test_a_fork_keeps_its_own_blocks_and_attention(change: Any, why: str) -> None:
    model = original.transformer()
    change(model)
    with pytest.raises(InvalidOption, match=why):
        _original_block.fuse(model, "TWINS")
    with pytest.raises(BackendUnavailable, match=why):
        wan_runtime.patch(model, attention="sdpa", skip=())
    if change is not _longer:  # whose Linear no rule covers
        assert wan_runtime.patch(model).attention is None
