"""One backward pass through a LoRA of a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig


def add_lora(model: Any, targets: Sequence[str]) -> None:
    """An adapter that does something, the same for every model; nothing but it is trained."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))


def gradients(model: Any, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What each trained parameter is given by the sum of the squares of one forward's result."""
    model(**arguments)[0].float().square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    found = {name: gradient for name, gradient in trained.items() if gradient is not None}
    assert found.keys() == trained.keys()
    return found


def joined(found: Mapping[str, torch.Tensor], part: str = "") -> torch.Tensor:
    """The gradients of those whose name has a part in it, in one row."""
    return torch.cat([gradient.flatten() for name, gradient in found.items() if part in name])
