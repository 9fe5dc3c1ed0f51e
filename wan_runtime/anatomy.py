"""What a checkpoint is made of, in facts that `compare` can put side by side; readable even where its dialect is not.

Everything comes from the header: block Linears with the tensors beside each, and the dtypes of biases, norms and
modulation. Which of a layer's tensors hold its weight and which scale it is what the file's reading says, whatever they
are called; by name it goes only where no dialect reads the file. How the weights are to be dequantised is listed once
for every dialect that fits.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_runtime import rules
from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.containers import read_header
from wan_runtime.dialects import DIALECTS
from wan_runtime.errors import AmbiguousDialect, CheckpointError
from wan_runtime.formulas import formula
from wan_runtime.header import Entry, Header
from wan_runtime.names import naming_of, to_original

INPUT_SCALES = ("input_scale", "scale_input", "input_global_scale")
NOT_SCALES = ("bias", "comfy_quant", *INPUT_SCALES)
NOT_OF_WEIGHT = ("payload", "input_scale", "spare")  # slots of a reading that do not scale the weight
CODED = ("F8_E4M3", "F8_E5M2", "U8", "I8", "I32")


@dataclass(frozen=True)
class Parts:
    """One block Linear's tensors, as the file spells what follows the module's path.

    payload  the leaf of its weight or of the codes.
    scales   the leaves of what else the weight is computed from.
    shape    (out, in) features where a dialect reads the file, else None.
    entries  leaf -> header entry: the payload first, the bias last.
    """

    payload: str
    scales: tuple[str, ...]
    shape: tuple[int, ...] | None
    entries: Mapping[str, Entry]

    @property
    def weight(self) -> Entry:
        """What the file holds in the weight's place."""
        return self.entries[self.payload]

    @property
    def packed(self) -> bool:
        """Whether the weight is held as codes that are not one number a byte."""
        if self.shape is None:
            return self.weight.dtype in ("U8", "I32")
        return self.weight.shape != self.shape


@dataclass(frozen=True)
class Reading:
    """One way to read the file's quantised weights. `format` is None where they are not quantised."""

    dialect: str
    meaning: str
    format: str | None
    formula: str
    layout: Mapping[str, str]


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint's parts. Paths are in the original spelling, counts are of tensors.

    readings  one, or several where nothing in the file says which is right, or none where no dialect is known for it.
    evidence  why that reading, or why none could be chosen.
    layers    block Linear -> its tensors.
    """

    path: str
    bytes: int
    tensors: int
    names: str
    prefix: str
    variant: str | None
    readings: tuple[Reading, ...]
    evidence: str
    markers: tuple[str, ...]
    scales: Mapping[str, int]
    input_scales: int
    biases: Mapping[str, int]
    norms: Mapping[str, int]
    modulation: Mapping[str, int]
    layers: Mapping[str, Parts]

    @property
    def decided(self) -> Reading | None:
        """The reading, where there is exactly one."""
        return self.readings[0] if len(self.readings) == 1 else None

    @property
    def quantised(self) -> int:
        """How many block Linears are stored as codes."""
        return sum(parts.weight.dtype in CODED for parts in self.layers.values())

    def to_dict(self, layer: str) -> dict[str, object]:
        """Everything but the layers, of which only the representative one is given."""
        fields = dataclasses.asdict(dataclasses.replace(self, layers={}))
        del fields["layers"]
        shown = {
            leaf: {"dtype": e.dtype, "shape": list(e.shape)} for leaf, e in self.layers[layer].entries.items()
        }
        return {**fields, "layer": shown}


def anatomy_of(path: Path | str) -> Anatomy:
    """Take a file apart. Raises CheckpointError when it is no safetensors file of a WAN transformer."""
    header = read_header(path)
    spelling, prefix = naming_of(header.path, header.entries)
    paths = {key: to_original(spelling, key.removeprefix(prefix)) for key in header.entries}
    opened, evidence = _openings(header)
    layers = _layers(header, paths, opened[0] if opened else None)
    leaves = Counter(leaf for parts in layers.values() for leaf in parts.entries)
    return Anatomy(
        path=str(header.path),
        bytes=header.nbytes,
        tensors=len(header.entries),
        names=spelling.name,
        prefix=prefix,
        variant=opened[0].variant.name if opened else None,
        readings=tuple(_reading(checkpoint) for checkpoint in opened),
        evidence=evidence,
        markers=_markers(header, leaves),
        scales=dict(Counter(leaf for parts in layers.values() for leaf in parts.scales)),
        input_scales=_input_scales(layers, opened[0] if opened else None),
        biases=_dtypes(header, paths, lambda path: path.endswith(".bias") and ".norm" not in path),
        norms=_dtypes(header, paths, lambda path: ".norm" in path),
        modulation=_dtypes(header, paths, lambda path: path.endswith("modulation")),
        layers=layers,
    )


def _layers(header: Header, paths: Mapping[str, str], checkpoint: Checkpoint | None) -> dict[str, Parts]:
    """Every block Linear whose weight is there. `paths`: key -> its path in the original spelling."""
    found: dict[str, dict[str, str]] = {}  # module -> leaf -> key
    for key, path in paths.items():
        module = block_linear(path)
        if module is not None:
            found.setdefault(module, {})[path.removeprefix(f"{module}.")] = key
    layers = {}
    for module, keys in found.items():
        if keys.keys() == {"bias"}:
            continue
        entries = {leaf: header.entries[key] for leaf, key in keys.items()}
        payload, scales = _roles(module, keys, entries, checkpoint)
        order = sorted(entries, key=lambda leaf: (leaf != payload, leaf == "bias", leaf))
        shape = None if checkpoint is None else checkpoint.shape_of(f"{module}.weight")
        layers[module] = Parts(payload, scales, shape, {leaf: entries[leaf] for leaf in order})
    return layers


def block_linear(path: str) -> str | None:
    """The block Linear that a tensor belongs to, however many components its own name has."""
    parts = path.split(".")
    modules = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((module for module in modules if rules.swaps(module)), None)


def _roles(
    module: str, keys: Mapping[str, str], entries: Mapping[str, Entry], checkpoint: Checkpoint | None
) -> tuple[str, tuple[str, ...]]:
    """The leaves of the weight and of its scales: as the file is read, or by name and size where nothing reads it."""
    layer = checkpoint.layers.get(module) if checkpoint else None
    if layer is not None:
        leaves = {key: leaf for leaf, key in keys.items()}
        payload = next(leaves[source.key] for source in layer.sources if source.slot == "payload")
        used = [leaves[source.key] for source in layer.sources if source.slot not in NOT_OF_WEIGHT]
        return payload, tuple(sorted({leaf for leaf in used if leaf not in (payload, "comfy_quant")}))
    payload = "weight" if "weight" in entries else max(entries, key=lambda leaf: entries[leaf].nbytes)
    return payload, tuple(sorted(leaf for leaf in entries if leaf != payload and leaf not in NOT_SCALES))


def _input_scales(layers: Mapping[str, Parts], checkpoint: Checkpoint | None) -> int:
    """How many block Linears have a static input scale."""
    if checkpoint is None:
        return sum(any(leaf in INPUT_SCALES for leaf in parts.entries) for parts in layers.values())
    read = (checkpoint.layers[module] for module in layers if module in checkpoint.layers)
    return sum(any(source.slot == "input_scale" for source in layer.sources) for layer in read)


def _openings(header: Header) -> tuple[list[Checkpoint], str]:
    """The file under each dialect that fits it, and the evidence or what stands in the way."""
    try:
        opened = open_checkpoint(header.path)
    except AmbiguousDialect as ambiguous:
        fitting = [open_checkpoint(header.path, dialect=name) for name in ambiguous.candidates]
        return fitting, ambiguous.why
    except CheckpointError as refused:
        return [], str(refused).removeprefix(f"{header.path}: ")
    return [opened], opened.evidence


def _reading(checkpoint: Checkpoint) -> Reading:
    dialect = checkpoint.dialect
    formats = Counter(layer.format for layer in checkpoint.layers.values())
    held = formats.most_common(1)[0][0] if formats else None
    layout = DIALECTS[dialect.name].marks({"any": held or ""}).layout
    return Reading(dialect.name, dialect.meaning, held, _formula(checkpoint, held, layout), layout)


def _formula(checkpoint: Checkpoint, held: str | None, layout: Mapping[str, str]) -> str:
    if held is None:
        return "W = weight"
    layer = next(layer for layer in checkpoint.layers.values() if layer.format == held)
    return formula(layer, layout)


def _markers(header: Header, leaves: Mapping[str, int]) -> tuple[str, ...]:
    """What in the file names its producer."""
    found = [f"header {name}" for name in header.metadata if name != "format"]
    found += (
        ["tensor scaled_fp8"] if any(k.rpartition(".")[2] == "scaled_fp8" for k in header.entries) else []
    )
    found += [f"comfy_quant x {leaves['comfy_quant']}"] if leaves.get("comfy_quant") else []
    found += ["config.json quantization_config"] if "quantization_config" in header.config else []
    return tuple(found)


def _dtypes(header: Header, paths: Mapping[str, str], wanted: Callable[[str], bool]) -> dict[str, int]:
    return dict(Counter(header.entries[key].dtype for key, path in paths.items() if wanted(path)))
