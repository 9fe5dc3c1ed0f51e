"""The tiny trained model under the original names: random weights carry no sign of how they lie."""

from __future__ import annotations

import functools

import torch
from safetensors.torch import load_file

from tests.builders.files import Content
from tests.builders.wan import Sizes, block_linears, rows, spelled
from tests.builders.writers import EVERY
from wan_runtime.tiny.variants import SOURCE


@functools.cache
def _trained(layers: int = 1) -> tuple[Sizes, dict[str, torch.Tensor]]:
    held = {key: tensor.float() for key, tensor in load_file(SOURCE).items()}
    dim, freq = held["condition_embedder.time_embedder.linear_1.weight"].shape
    text = held["condition_embedder.text_embedder.linear_1.weight"].shape[1]
    channels = held["patch_embedding.weight"].shape[1]
    ffn = held["blocks.0.ffn.net.0.proj.weight"].shape[0]
    sizes = Sizes(dim=dim, ffn=ffn, layers=layers, channels=channels, text=text, freq=freq)
    return sizes, {row[0]: held[row[1]] for row in rows(sizes)}


@functools.cache
def trained(dialect: str, weight_format: str, prefix: str = "", layers: int = 1) -> Content:
    """The content of a file in one dialect, with the model's first blocks; not to be changed."""
    sizes, tensors = _trained(layers)
    modules = block_linears(sizes, prefix=prefix)
    named = {prefix + key: tensor for key, tensor in tensors.items()}
    return EVERY[dialect][0](named, modules, weight_format)


def originals() -> dict[str, torch.Tensor]:
    """Every tensor before it was quantised, fp32, by its original key."""
    return _trained()[1]


def respelled(key: str) -> str:
    """A key of the original spelling under diffusers' names; it may be a module's."""
    sizes, _ = _trained()
    names = {spelled("original")(row): spelled("diffusers")(row) for row in rows(sizes)}
    return next(to.removesuffix(".weight") for name, to in names.items() if name == f"{key}.weight")
