"""The tensors of a tiny WAN transformer under both spellings, listed by hand in one order."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_EMBEDDINGS = (  # original, diffusers
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("head.head", "proj_out"),
)
_IMAGE = (
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
)
BLOCK_LINEARS = (
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)
_IMAGE_LINEARS = (("cross_attn.k_img", "attn2.add_k_proj"), ("cross_attn.v_img", "attn2.add_v_proj"))
_NORMS = (
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a WAN transformer; `image` adds the image embedding of I2V."""

    dim: int = 128
    ffn: int = 256
    layers: int = 2
    channels: int = 16
    text: int = 32
    freq: int = 32
    image: int | None = None


TINY = Sizes()
Row = tuple[str, str, tuple[int, ...]]  # original key, diffusers key, shape


def rows(sizes: Sizes = TINY) -> list[Row]:
    """Every tensor of the model: its key in both spellings and its shape."""
    return [*_top(sizes), *(row for n in range(sizes.layers) for row in _block(sizes, n))]


def hollow(path: Path, sizes: Sizes) -> Path:
    """A bf16 file of a model of any size that takes no room on the disk: its header, then a hole."""
    header, end = {}, 0
    for key, _, shape in rows(sizes):
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def _top(sizes: Sizes) -> Iterator[Row]:
    dim = sizes.dim
    yield "patch_embedding.weight", "patch_embedding.weight", (dim, sizes.channels, 1, 2, 2)
    yield "patch_embedding.bias", "patch_embedding.bias", (dim,)
    shapes = [(dim, sizes.freq), (dim, dim), (6 * dim, dim), (dim, sizes.text), (dim, dim), (64, dim)]
    for (original, diffusers), shape in zip(_EMBEDDINGS, shapes, strict=True):
        yield from _linear(original, diffusers, shape)
    yield "head.modulation", "scale_shift_table", (1, 2, dim)
    if sizes.image is not None:
        image = sizes.image
        for (original, diffusers), out, inp in zip(
            _IMAGE, (image, image, dim, dim), (None, image, image, None), strict=True
        ):
            yield from _linear(original, diffusers, (out,) if inp is None else (out, inp))


def _block(sizes: Sizes, number: int) -> Iterator[Row]:
    dim, at = sizes.dim, f"blocks.{number}"
    yield f"{at}.modulation", f"{at}.scale_shift_table", (1, 6, dim)
    shapes = {"ffn.0": (sizes.ffn, dim), "ffn.2": (dim, sizes.ffn)}
    linears = BLOCK_LINEARS + (_IMAGE_LINEARS if sizes.image else ())
    for original, diffusers in linears:
        yield from _linear(f"{at}.{original}", f"{at}.{diffusers}", shapes.get(original, (dim, dim)))
    norms = _NORMS + ((("cross_attn.norm_k_img", "attn2.norm_added_k"),) if sizes.image else ())
    for original, diffusers in norms:
        yield f"{at}.{original}.weight", f"{at}.{diffusers}.weight", (dim,)
    yield from _linear(f"{at}.norm3", f"{at}.norm2", (dim,))


def _linear(original: str, diffusers: str, shape: tuple[int, ...]) -> Iterator[Row]:
    yield f"{original}.weight", f"{diffusers}.weight", shape
    yield f"{original}.bias", f"{diffusers}.bias", (shape[0],)


def spelled(spelling: str) -> Callable[[Row], str]:
    """Picks a row's key in one spelling."""
    return {"original": lambda row: row[0], "diffusers": lambda row: row[1]}[spelling]


def state(
    sizes: Sizes = TINY, *, spelling: str = "original", prefix: str = "", seed: int = 0
) -> dict[str, torch.Tensor]:
    """fp32 tensors, the same values under either spelling; rows of a matrix differ in size, as in trained weights."""
    generator = torch.Generator().manual_seed(seed)
    key = spelled(spelling)
    tensors = {}
    for row in rows(sizes):
        shape = row[2]
        tensor = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            spread = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
            tensor = tensor * 0.03 * torch.exp(0.3 * spread)
        else:
            tensor = 0.1 * tensor + (1.0 if ".norm" in row[0] and row[0].endswith("weight") else 0.0)
        tensors[prefix + key(row)] = tensor
    return tensors


def block_linears(sizes: Sizes = TINY, spelling: str = "original", prefix: str = "") -> list[str]:
    """Module paths of the Linears that producers quantise."""
    which = 0 if spelling == "original" else 1
    return [
        f"{prefix}blocks.{number}.{pair[which]}" for number in range(sizes.layers) for pair in BLOCK_LINEARS
    ]
