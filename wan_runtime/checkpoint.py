"""From a file to canonical slots: header -> dialect -> names -> a stream of layers, with every key accounted for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from wan_runtime import assembling, gates, settling
from wan_runtime.containers import read_header
from wan_runtime.deciding import decide, hold, readings
from wan_runtime.dialects import DIALECTS, Dialect, Layer, Reading, identify
from wan_runtime.doubts import Doubts, Refuse, at_once
from wan_runtime.errors import AmbiguousDialect, BadTensor, CheckpointError
from wan_runtime.header import DTYPES, Header
from wan_runtime.names import PATCH, Spelling, Variant, naming_of, to_original, variant_of
from wan_runtime.uploading import tensors_on


@dataclass(frozen=True)
class View:
    """A plain tensor that is not in the file as it is wanted, but made of tensors that are: `keys`, in this order."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An opened file: no weights read yet. All paths are in the original release's spelling, without prefix.

    layers   module path -> how its slots are read.
    plain    tensor path (with its leaf, "blocks.0.norm3.weight") -> key in the file.
    views    tensor path -> what it is made of, for plain tensors that a host wants otherwise than the file has them.
    insisted the caller named the dialect, or a reference settled it: the weights are not asked what they suggest.
    """

    header: Header
    dialect: Dialect
    evidence: str
    spelling: Spelling
    prefix: str
    variant: Variant
    layers: Mapping[str, Layer]
    plain: Mapping[str, str]
    markers: tuple[str, ...]
    views: Mapping[str, View] = field(default_factory=dict)
    insisted: bool = False

    @property
    def path(self) -> Path:
        return self.header.path

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """The logical shape of a module's weight or of a plain tensor; packed dimensions unpacked."""
        module, _, leaf = tensor.rpartition(".")
        if leaf == "weight" and module in self.layers:
            return self.layers[module].shape
        if tensor in self.views:
            return self.views[tensor].shape
        return self.header.entries[self.plain[tensor]].shape


@dataclass(frozen=True)
class Loaded:
    """One layer or one plain tensor, on the target device. `format` is None for a plain tensor in slot "tensor"."""

    path: str
    format: str | None
    slots: Mapping[str, torch.Tensor]


def open_checkpoint(
    path: Path | str,
    *,
    dialect: str | None = None,
    reference: Path | str | None = None,
    pickle: bool = False,
) -> Checkpoint:
    """Read a file's header, decide its dialect and names, and account for every key.

    Args:
        path: a file, or the folder or index of a checkpoint in several (wan_runtime.containers.read_header).
        dialect: the dialect's name, where the caller knows it.
        reference: the bf16 file it was made from; settles a file that several dialects fit.
        pickle: whether a .pth file may be unpickled (tensors only); `convert` alone wants that.

    Raises CheckpointError and its subclasses; docs/formats.md says how each case is decided.
    """
    header = read_header(path, pickle=pickle)
    if reference is not None and not Path(reference).exists():
        raise CheckpointError(reference, "there is no such file to be the reference.")
    naming_of(header.path, header.entries)  # that it is a WAN transformer at all comes before who wrote it
    if reference is not None and dialect is None:
        dialect_record, evidence = _settle(header, Path(reference))
    else:
        dialect_record, evidence = decide(header, dialect)
    checkpoint = _interpret(header, dialect_record, evidence)
    return replace(checkpoint, insisted=dialect is not None or reference is not None)


def _interpret(header: Header, dialect: Dialect, evidence: str) -> Checkpoint:
    reading = dialect.read(header)
    spelling, prefix = naming_of(header.path, header.entries)
    for name, layer in reading.layers.items():
        gates.check_bias(header.path, layer, header.entries.get(f"{name}.bias"))
    layers = _renamed(header, spelling, prefix, reading.layers)
    plain = _renamed(header, spelling, prefix, reading.plain)
    _refuse_overlap(header, reading, layers, plain)
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}.weight": reading.layers[name].shape for path, name in layers.items()
    }
    views = _convolution(header, plain)
    shapes |= {path: header.entries[key].shape for path, key in plain.items()}
    shapes |= {path: view.shape for path, view in views.items()}
    return Checkpoint(
        header=header,
        dialect=dialect,
        evidence=f"{_arrangement(dialect, reading)}{evidence}",
        spelling=spelling,
        prefix=prefix,
        variant=variant_of(header.path, shapes, spelling.name),
        layers={path: reading.layers[name] for path, name in layers.items()},
        plain=plain,
        markers=reading.markers,
        views=views,
    )


def _arrangement(dialect: Dialect, reading: Reading) -> str:
    """What keys and shapes do not say of a dialect's packed and block-scaled layers, "nibble even low: ", or ""."""
    layout = dialect.marks({path: layer.format for path, layer in reading.layers.items()}).layout
    held = sorted({layer.format for layer in reading.layers.values()})
    words = ", ".join(f"{what} {how}" for what, how in layout.items())
    return f"{', '.join(held)}, {words}: " if words else ""


def _convolution(header: Header, plain: Mapping[str, str]) -> dict[str, View]:
    """The patch embedding where a file stores it flattened to [dim, channels * 4] (TurboDiffusion has a Linear)."""
    path = "patch_embedding.weight"
    shape = header.entries[plain[path]].shape if path in plain else ()
    size = math.prod(PATCH)
    if len(shape) != 2 or shape[1] % size:
        return {}
    whole = (shape[0], shape[1] // size, *PATCH)
    return {path: View((plain[path],), whole, lambda parts: parts[0].reshape(whole))}


def _renamed(header: Header, spelling: Spelling, prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Original path -> name in the file; two names for one path are refused."""
    renamed: dict[str, str] = {}
    for name in names:
        path = to_original(spelling, name.removeprefix(prefix))
        if path in renamed:
            raise BadTensor(
                header.path, name, f"it is in the file twice, also as {renamed[path]!r}; which one is meant?"
            )
        renamed[path] = name
    return renamed


def _refuse_overlap(
    header: Header, reading: Reading, layers: Mapping[str, str], plain: Mapping[str, str]
) -> None:
    for path, name in layers.items():
        if f"{path}.weight" in plain:
            raise BadTensor(
                header.path,
                plain[f"{path}.weight"],
                f"it is in the file twice, also quantised as {name + '.weight'!r}.",
            )


def _settle(header: Header, reference: Path) -> tuple[Dialect, str]:
    """Choose among the readings that fit by their distance to the file the weights were made from."""
    base = open_checkpoint(reference)
    modules = {tensor.removesuffix(".weight") for tensor in base.plain if tensor.endswith(".weight")}
    source = settling.Reference(base.path, modules, lambda path: read_plain(base, f"{path}.weight"))

    def read_as(name: str) -> settling.Candidate:
        checkpoint = _interpret(header, DIALECTS[name], "")
        formats = {path: layer.format for path, layer in checkpoint.layers.items()}
        return settling.Candidate(formats, lambda path: read_layer(checkpoint, path))

    try:
        dialect, evidence = identify(header)
    except AmbiguousDialect as ambiguous:
        name, evidence = settling.settle(header.path, readings(ambiguous), read_as, source)
        return DIALECTS[name], evidence
    error = settling.confirm(header.path, dialect.name, read_as(dialect.name), source)
    return dialect, ", ".join(filter(None, (evidence, error)))


def read_layer(checkpoint: Checkpoint, path: str) -> dict[str, torch.Tensor]:
    """All slots of one layer, on the CPU, checked."""
    header, layer = checkpoint.header, checkpoint.layers[path]
    given: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(source.key for source in layer.sources):
        given |= assembling.decoded(header.path, layer, key, header.read_tensor(key), at_once)
    return assembling.complete(header.path, layer, given, at_once)


def read_plain(checkpoint: Checkpoint, tensor: str) -> torch.Tensor:
    """One unquantised tensor, on the CPU, checked; fp8 ones of a plain-cast file come as fp32."""
    view = checkpoint.views.get(tensor)
    keys = (checkpoint.plain[tensor],) if view is None else view.keys
    read = checkpoint.header.read_tensor
    parts = [
        assembling.plain(checkpoint.path, key, read(key), _bounded_by(checkpoint), at_once) for key in keys
    ]
    return parts[0] if view is None else view.make(parts)


def _bounded_by(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.insisted else checkpoint.dialect.name


def stream(checkpoint: Checkpoint, device: torch.device) -> Iterator[Loaded]:
    """Read the file in its own order onto the device and yield complete layers, decoded there.

    Damaged values are told late, by the end at the latest: install nothing before the stream has ended.
    Raises CheckpointError before the first where the weights contradict the file's marks.
    """
    if not checkpoint.insisted:
        modules = {layer.module: layer for layer in checkpoint.layers.values()}
        hold(checkpoint.header, checkpoint.dialect.name, checkpoint.evidence, modules)
    doubts = Doubts(device)
    try:
        yield from _assembled(checkpoint, device, doubts)
    except CheckpointError:
        doubts.settle()  # what was damaged before this is told first
        raise
    doubts.settle()


def _assembled(checkpoint: Checkpoint, device: torch.device, refuse: Refuse) -> Iterator[Loaded]:
    owners = _owners(checkpoint)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    markers = set(checkpoint.markers)
    keys = [key for key in checkpoint.header.entries if key not in markers]
    for key, tensor in tensors_on(checkpoint.header, keys, device):
        for path in owners[key]:  # a key that nothing owns is a defect of the dialect, and a KeyError here
            waiting.setdefault(path, {}).update(_given(checkpoint, path, key, tensor, refuse))
            if len(waiting[path]) == _wanted(checkpoint, path):
                yield _loaded(checkpoint, path, waiting.pop(path), refuse)
        del tensor  # the caller's now, if it keeps it


def _given(
    checkpoint: Checkpoint, path: str, key: str, tensor: torch.Tensor, refuse: Refuse
) -> dict[str, torch.Tensor]:
    """What a key gives to its layer, by slot, or to its plain tensor, by key."""
    if path in checkpoint.layers:
        return assembling.decoded(checkpoint.path, checkpoint.layers[path], key, tensor, refuse)
    return {key: assembling.plain(checkpoint.path, key, tensor, _bounded_by(checkpoint), refuse)}


def _wanted(checkpoint: Checkpoint, path: str) -> int:
    """How many slots or tensors a layer or plain tensor is made of."""
    if path in checkpoint.layers:
        return len(checkpoint.layers[path].sources)
    return len(checkpoint.views[path].keys) if path in checkpoint.views else 1


def _loaded(checkpoint: Checkpoint, path: str, parts: dict[str, torch.Tensor], refuse: Refuse) -> Loaded:
    layer = checkpoint.layers.get(path)
    if layer is not None:
        return Loaded(path, layer.format, assembling.complete(checkpoint.path, layer, parts, refuse))
    view = checkpoint.views.get(path)
    if view is None:
        return Loaded(path, None, {"tensor": parts[checkpoint.plain[path]]})
    return Loaded(path, None, {"tensor": view.make([parts[name] for name in view.keys])})


def _owners(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Key -> what is read from it: a layer or a tensor, or two halves of one."""
    owners: dict[str, list[str]] = {}
    for path, layer in checkpoint.layers.items():
        for key in dict.fromkeys(source.key for source in layer.sources):
            owners.setdefault(key, []).append(path)
    for path, key in checkpoint.plain.items():
        for name in checkpoint.views[path].keys if path in checkpoint.views else (key,):
            owners.setdefault(name, []).append(path)
    return owners


def plain_dtype(checkpoint: Checkpoint, tensor: str) -> torch.dtype:
    """The dtype a plain tensor has in the file."""
    return DTYPES[checkpoint.header.entries[checkpoint.plain[tensor]].dtype]
