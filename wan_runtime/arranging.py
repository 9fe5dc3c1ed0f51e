"""A checkpoint as another spelling cuts it: where two hosts differ by more than names.

Only Wan Animate has such modules. The original release's face adapter has one `linear1_kv` where diffusers has two
modules, keys first; its activations' biases are [1, C, 1, 1] where diffusers' are [C]; and it stores the constant
kernel of each blur, which diffusers makes for itself. Source: diffusers, scripts/convert_wan_to_diffusers.py.

Splitting is exact in every format: canonical slots hold a row's codes and block scales in that row, and a scale for the
whole tensor is copied. Joining is exact where each row has its scale or can be given one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch

from wan_runtime.checkpoint import Checkpoint, View
from wan_runtime.dialects import Layer, Source
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.formats import FORMATS
from wan_runtime.names import Spelling

Slots = Mapping[str, torch.Tensor]
_ADAPTER = r"face_adapter\.fuser_blocks\.\d+\.linear1_"
_FUSED = re.compile(rf"{_ADAPTER}kv")
_KEYS = re.compile(rf"{_ADAPTER}k")
_ACTIVATION = re.compile(r"motion_encoder\.enc\.net_app\.convs\..*\.bias")
_BLUR = re.compile(r"motion_encoder\.enc\.net_app\.convs\..*\.kernel")
_PARTS = "kv"
SHARED = ("rotation", "pre_scale", "low_rank_a", "input_scale")  # slots of a layer's input, not of its rows


def arranged(checkpoint: Checkpoint, spelling: Spelling) -> Checkpoint:
    """The checkpoint with its modules cut as `spelling` has them; itself where the two agree.

    Raises CheckpointError when only the spelling tells the model from another one that would take its weights
    (Wan-Animate-2 from I2V-14B), BadTensor for a tensor that cannot be cut so: halves quantised in ways that one module
    cannot hold, a stored blur kernel that is not the one that diffusers makes.
    """
    if checkpoint.variant.kind == "animate_2" and "animate_2" not in spelling.name:
        raise CheckpointError(
            checkpoint.path,
            f"it is a {checkpoint.variant.name}, which has the shapes of an I2V model and computes otherwise; only its "
            f"names tell, and {spelling.name!r} names would lose that. Use a model of its own class, or "
            "names='animate_2' or 'diffusers_animate_2'.",
        )
    if checkpoint.spelling.halves == spelling.halves or checkpoint.variant.kind != "animate":
        return checkpoint
    return _split(checkpoint) if spelling.halves else _joined(checkpoint)


def _split(checkpoint: Checkpoint) -> Checkpoint:
    layers: dict[str, Layer] = {}
    for path, layer in checkpoint.layers.items():
        if _FUSED.fullmatch(path):
            layers |= {f"{path[:-2]}{part}": _half(layer, n) for n, part in enumerate(_PARTS)}
        else:
            layers[path] = layer
    plain: dict[str, str] = {}
    views: dict[str, View] = {}
    kernels = []
    for tensor, key in checkpoint.plain.items():
        module, _, leaf = tensor.rpartition(".")
        shape = checkpoint.header.entries[key].shape
        if _BLUR.fullmatch(tensor):
            _check_kernel(checkpoint, key)
            kernels.append(key)
        elif _FUSED.fullmatch(module):
            for n, part in enumerate(_PARTS):
                half = f"{module[:-2]}{part}.{leaf}"
                plain[half], views[half] = key, _half_view(key, shape, n)
        else:
            plain[tensor] = key
            if _ACTIVATION.fullmatch(tensor) and len(shape) == 4:
                views[tensor] = View((key,), shape[1:2], lambda parts: parts[0].reshape(-1))
    return dataclasses.replace(
        checkpoint, layers=layers, plain=plain, views=views, markers=(*checkpoint.markers, *kernels)
    )


def _half(layer: Layer, half: int) -> Layer:
    """The rows of keys or of values of a quantised layer, cut out once its canonical slots are whole."""
    out, inp = layer.shape

    def whole(source: Source) -> Source:
        return dataclasses.replace(source, decode=lambda tensor, *_: source.decode(tensor, out, inp))

    def finish(given: Slots) -> Slots:
        return {name: _rows(name, slot, half) for name, slot in layer.finish(given).items()}

    sources = tuple(whole(source) for source in layer.sources)
    return dataclasses.replace(layer, shape=(out // 2, inp), sources=sources, finish=finish)


def _rows(name: str, slot: torch.Tensor, half: int) -> torch.Tensor:
    """Half the rows of a slot; one that has none of its own a row is the same for both. Blocks must part evenly."""
    rows = slot.shape[0]
    if rows == 1 or name in SHARED:
        return slot
    if rows % 2:
        raise ValueError(
            f"its scales come in {rows} blocks of rows, and the middle one belongs to keys and to values; it cannot be "
            "split for diffusers' two modules. Convert the bf16 original instead."
        )
    return slot[half * rows // 2 : (half + 1) * rows // 2].contiguous()


def _half_view(key: str, shape: tuple[int, ...], half: int) -> View:
    rows = shape[0] // 2
    return View((key,), (rows, *shape[1:]), lambda parts: parts[0][half * rows : (half + 1) * rows].clone())


def _check_kernel(checkpoint: Checkpoint, key: str) -> None:
    """Leaving a kernel out is right only where it is the constant that diffusers makes: (1, 3, 3, 1) both ways."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu")
    constant = row[:, None] * row[None, :] / 64
    kernel = checkpoint.header.read_tensor(key).float()
    if kernel.shape != constant.shape or not torch.allclose(kernel, constant, atol=1e-3):
        raise BadTensor(
            checkpoint.path,
            key,
            "it is not the blur kernel of Wan Animate, the only one that diffusers' class computes with.",
        )


def _joined(checkpoint: Checkpoint) -> Checkpoint:
    layers: dict[str, Layer] = {}
    plain = dict(checkpoint.plain)
    views: dict[str, View] = {}
    for path, layer in checkpoint.layers.items():
        if not _in_half(path):
            layers[path] = layer
        elif _KEYS.fullmatch(path):
            other = checkpoint.layers.get(f"{path[:-1]}v")
            layers[f"{path}v"] = _join(checkpoint, layer, other)
    for tensor, key in checkpoint.plain.items():
        module, _, leaf = tensor.rpartition(".")
        shape = checkpoint.header.entries[key].shape
        if _KEYS.fullmatch(module):
            other_key = checkpoint.plain.get(f"{module[:-1]}v.{leaf}")
            if other_key is None:
                raise BadTensor(
                    checkpoint.path, key, "its other half, of the values, is missing or quantised."
                )
            whole = f"{module}v.{leaf}"
            del plain[tensor], plain[f"{module[:-1]}v.{leaf}"]
            plain[whole] = key
            views[whole] = View(
                (key, other_key), (2 * shape[0], *shape[1:]), lambda parts: torch.cat(list(parts))
            )
        elif _ACTIVATION.fullmatch(tensor) and len(shape) == 1:
            views[tensor] = View((key,), (1, *shape, 1, 1), lambda parts: parts[0].reshape(1, -1, 1, 1))
    return dataclasses.replace(checkpoint, layers=layers, plain=plain, views=views)


def _in_half(path: str) -> bool:
    return re.fullmatch(rf"{_ADAPTER}[kv]", path) is not None


def _join(checkpoint: Checkpoint, keys: Layer, values: Layer | None) -> Layer:
    """One layer of two halves in one format; each source's slot is marked with its half until both are there."""
    if values is None or values.format != keys.format or values.shape != keys.shape:
        raise BadTensor(
            checkpoint.path,
            f"{keys.module}.weight",
            f"it is {keys.format} {list(keys.shape)} and its other half, of the values, is not; the original release "
            "has one module for both, which cannot hold them.",
        )
    halves = (keys, values)

    def finish(given: Slots) -> Slots:
        done = [
            half.finish({name[2:]: slot for name, slot in given.items() if name[0] == _PARTS[n]})
            for n, half in enumerate(halves)
        ]
        if done[0].keys() != done[1].keys():
            raise ValueError(f"keys have {', '.join(done[0])} and values {', '.join(done[1])}.")
        return {name: _one(name, [slots[name] for slots in done], keys) for name in done[0]}

    sources = tuple(
        dataclasses.replace(
            source,
            slot=f"{_PARTS[n]}.{source.slot}",
            decode=lambda tensor, *_, source=source: source.decode(tensor, *keys.shape),
        )
        for n, half in enumerate(halves)
        for source in half.sources
    )
    return dataclasses.replace(keys, shape=(2 * keys.shape[0], keys.shape[1]), sources=sources, finish=finish)


def _one(name: str, halves: Sequence[torch.Tensor], layer: Layer) -> torch.Tensor:
    """One slot of two: rows follow each other, equal values are shared, one fp32 scale a tensor becomes one a row."""
    first, second = halves
    if name not in SHARED and first.shape == second.shape and first.shape[0] != 1:
        return torch.cat(list(halves))
    if torch.equal(first, second):
        return first
    out, inp = layer.shape
    _, shapes = FORMATS[layer.format].layout(2 * out, inp).get(name, (None, ()))
    if (2 * out, 1) not in shapes:
        raise ValueError(f"keys and values have different {name}, and one module has room for one.")
    return torch.cat([half.expand(out, -1) for half in halves]).contiguous()
