"""What the weights themselves say about how an NVFP4 file is laid out: a test of the layout and one of the nibbles.

Both only confirm or contradict a mark, and neither decides for a file without one (docs/formats.md, section 4): they
rest on how trained weights are, not on anything a producer writes. On weights without structure they say nothing.

Layout: rows and columns of a trained matrix differ in size, so the logarithms of its block scales are partly the sum
of a row's mean and a column's mean. In the right order that part is larger; in the other one, rows are mixed up.

Nibbles: two layers that meet in one channel grow together in training: the rows of ffn.0 and the columns of ffn.2,
the rows of v and the columns of o, the weights of norm3 and the columns of the cross-attention's q. Swapped nibbles
exchange neighbouring columns and no rows, which turns the sign of the correlation between neighbours' differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from wan_runtime.dialects import Layer, Source, _swizzle
from wan_runtime.formats import FORMATS, Slots
from wan_runtime.header import Header

T = TypeVar("T")
LAYERS_READ = 8  # a layer of a 14B model has 1.6 MB of block scales
BLOCKS_READ = 4
SAMPLED = 1024  # rows or columns that a channel's size is taken from
LAYOUT_RATIO = 1.15  # of the two shares, summed over layers; measured in docs/formats.md, section 4
LAYOUT_SIGMAS = 8.0
NIBBLE_CORRELATION = 0.15  # the mean over pairs, and every family of pairs on the same side
NIBBLE_SIGMAS = 8.0
PACKED = ("nvfp4", "mxfp4", "int4")  # two codes a byte

# In a block, under both spellings: what writes a channel by its rows, and what reads it by its columns.
MEETINGS = (
    ("ffn", ("ffn.0.weight", "ffn.2"), ("ffn.net.0.proj.weight", "ffn.net.2")),
    ("self-attention", ("self_attn.v.weight", "self_attn.o"), ("attn1.to_v.weight", "attn1.to_out.0")),
    ("cross-attention", ("cross_attn.v.weight", "cross_attn.o"), ("attn2.to_v.weight", "attn2.to_out.0")),
    ("norm", ("norm3.weight", "cross_attn.q"), ("norm2.weight", "attn2.to_q")),
)


# What it takes to contradict a mark rather than to suggest an answer.
WIDE_RATIO = 1.3
WIDE_CORRELATION = 0.3
Order = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Finding:
    """What a test says. `answer` is None where the weights carry too little signal; `wide` is a margin to act on."""

    answer: str | None
    words: str
    wide: bool = False


def _untiled(scales: torch.Tensor) -> torch.Tensor:
    return _swizzle.unswizzle(scales, *scales.shape)


STORED: Mapping[str, tuple[Order, ...]] = {"plain": (lambda scales: scales,), "swizzled": (_untiled,)}
READ: Mapping[str, tuple[Order, ...]] = {
    "right": STORED["plain"],
    "in another order": (_untiled, _swizzle.swizzle),  # read as plain and swizzled, or the reverse
}


def layout_test(scales: Iterable[torch.Tensor], orders: Mapping[str, tuple[Order, ...]] = STORED) -> Finding:
    """In which order block scales make sense: as stored, "plain" or "swizzled"; as a dialect reads them, by READ.

    scales: of each layer, as float8_e4m3fn or the uint8 bytes of E8M0, [rows, columns]. Only rows that 128 divides and
    columns that 4 divides are asked: others have different shapes in the two orders.
    """
    shares = dict.fromkeys(orders, 0.0)
    noise, count = 0.0, 0
    for given in scales:
        rows, cols = given.shape
        if (rows, cols) != _swizzle.padded(rows, cols):
            continue
        for name, several in orders.items():
            shares[name] += max(_share(order(given)) for order in several)
        noise += (
            4 * (rows + cols) / (rows * cols) ** 2
        )  # the variance of two shares' difference on pure noise
        count += 1
    best, second = sorted(shares, key=lambda name: -shares[name])[:2]
    if not count or shares[best] <= 0:
        return Finding(None, "the layout test has no layer to go by")
    sigmas = (shares[best] - shares[second]) / math.sqrt(noise)
    listed = ", ".join(f"{name} {share / count:.3f}" for name, share in shares.items())
    words = f"rows and columns explain of the block scales' variance: {listed} ({count} layers)"
    if sigmas < LAYOUT_SIGMAS or shares[best] < LAYOUT_RATIO * shares[second]:
        return Finding(None, f"the layout test gives no answer: {words}")
    wide = shares[best] >= WIDE_RATIO * shares[second]
    return Finding(best, f"the layout test says {best}: {words}", wide)


def _share(scales: torch.Tensor) -> float:
    """The share of the variance of the log scales that row means and column means explain."""
    if scales.dtype is torch.uint8:  # E8M0: the byte is the logarithm
        logs = scales.float()
    else:
        logs = scales.contiguous().float().nan_to_num(0.0).clamp_min(2.0**-9).log2()
    logs = logs - logs.mean()
    total = float(logs.square().mean())
    explained = logs.mean(0).square().mean() + logs.mean(1).square().mean()
    return float(explained) / total if total > 0 else 0.0


def layouts(header: Header, keys: Sequence[str]) -> Finding:
    """The layout test over block scales as a file stores them; reads a few of `keys`."""
    apart = [k for k in keys if len(header.entries[k].shape) == 2 and header.entries[k].dtype == "F8_E4M3"]
    return layout_test(header.read_tensor(key) for key in _few(apart, LAYERS_READ))


def read_layouts(header: Header, layers: Mapping[str, Layer]) -> Finding:
    """The layout test over block scales as `layers` reads them."""
    sources = [(s, layer) for layer in layers.values() for s in layer.sources if s.slot == "block_scale"]
    return layout_test((_scales(header, s, layer) for s, layer in _few(sources, LAYERS_READ)), READ)


def _scales(header: Header, source: Source, layer: Layer) -> torch.Tensor:
    """The block scales of one layer in canonical order, under a dtype that says what their bytes mean."""
    scales = source.decode(header.read_tensor(source.key), *layer.shape)
    return scales.view(torch.float8_e4m3fn) if layer.format == "nvfp4" else scales


def _few(several: Sequence[T], limit: int) -> Sequence[T]:
    """At most `limit` of them, spread over all."""
    return several[:: max(len(several) // limit, 1)][:limit]


def nibble_test(header: Header, layers: Mapping[str, Layer]) -> Finding:
    """Whether the nibbles are "right" or "swapped", as `layers` reads them; reads a few blocks of packed layers."""
    found: dict[str, list[tuple[float, int]]] = {}
    for family, writer, reader in _meetings(header, layers):
        rows = _channel_sizes(header, layers, writer, 1)
        columns = _channel_sizes(header, layers, reader, 0)
        if rows is not None and columns is not None and rows.shape == columns.shape:
            found.setdefault(family, []).append(_correlation(rows, columns))
    pairs = [pair for several in found.values() for pair in several]
    if not pairs:
        return Finding(None, "the nibble test has no layers to go by")
    means = {family: sum(r for r, _ in several) / len(several) for family, several in found.items()}
    mean = sum(means.values()) / len(means)
    sigmas = abs(sum(r * math.sqrt(n) for r, n in pairs)) / math.sqrt(len(pairs))
    words = ", ".join(f"{family} {value:+.2f}" for family, value in means.items())
    words = f"neighbouring channels correlate {words} with the layers that they meet"
    agreed = len({value > 0 for value in means.values()}) == 1
    if not agreed or len(means) < 2 or sigmas < NIBBLE_SIGMAS or abs(mean) < NIBBLE_CORRELATION:
        return Finding(None, f"the nibble test gives no answer: {words}")
    answer = "right" if mean > 0 else "swapped"
    wide = abs(mean) >= WIDE_CORRELATION
    return Finding(answer, f"the nibble test says that they are {answer}: {words}", wide)


def _meetings(header: Header, layers: Mapping[str, Layer]) -> list[tuple[str, str, str]]:
    """(family, key of the weight that writes by rows, module whose columns read it), of a few blocks."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for family, *spellings in MEETINGS:
        for writer, reader in spellings:
            for module, layer in layers.items():
                block = module.removesuffix(reader)
                if block != module and layer.format in PACKED:
                    found.setdefault(block, []).append((family, f"{block}{writer}", module))
    return [meeting for block in _few(list(found), BLOCKS_READ) for meeting in found[block]]


def _channel_sizes(header: Header, layers: Mapping[str, Layer], name: str, dim: int) -> torch.Tensor | None:
    """The size of each channel along the other dimension than `dim`: of a layer, of a plain matrix, or of a norm."""
    module = name.removesuffix(".weight")
    if module in layers:
        weight = _some(layers[module], slots_of(header, layers[module]), dim)
        return None if weight is None else weight.square().mean(dim).sqrt()
    entry = header.entries.get(name)
    if entry is None or entry.dtype not in ("F32", "BF16", "F16"):
        return None
    weight = header.read_tensor(name).float()
    return weight.abs() if weight.ndim == 1 else weight.square().mean(dim).sqrt()


def _some(layer: Layer, slots: Slots, dim: int) -> torch.Tensor | None:
    """A packed layer dequantised, cut along `dim` to what suffices: its sizes are means over that dimension."""
    if layer.format not in PACKED:
        return None
    names, size = FORMATS[layer.format].layout(*layer.shape), layer.shape[dim]
    cut = {name: slots[name] for name in names}
    if size > SAMPLED and size % SAMPLED == 0:
        for name, tensor in cut.items():
            length = tensor.shape[dim] * SAMPLED // size
            cut[name] = tensor.narrow(dim, 0, length).contiguous() if length else tensor
    return FORMATS[layer.format].dequantize(cut)


def slots_of(header: Header, layer: Layer) -> Mapping[str, torch.Tensor]:
    """A layer's canonical slots, not checked; ValueError where its tensors do not fit."""
    given = {s.slot: s.decode(header.read_tensor(s.key), *layer.shape) for s in layer.sources}
    return layer.finish(given)


def _correlation(rows: torch.Tensor, columns: torch.Tensor) -> tuple[float, int]:
    """Between the log ratios of neighbouring channels, even over odd; with the number of pairs."""
    a, b = (x.float().clamp_min(1e-12).log2() for x in (rows, columns))
    a, b = (x[0::2][: len(x) // 2] - x[1::2] for x in (a, b))
    # Ratios beyond a factor of 16 come from dead channels; one of them must not decide alone.
    a, b = (x.clamp(-4, 4) for x in (a, b))
    norm = float(a.norm() * b.norm())
    return (float((a * b).sum()) / norm if norm > 0 else 0.0), len(a)
