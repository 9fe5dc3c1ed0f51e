"""What a checkpoint is made of, in facts that `compare` can put side by side; readable even where its dialect is not.

Everything comes from the header: block Linears with the tensors beside each, and the dtypes of biases, norms and
modulation. How the weights are to be dequantised is listed once for every dialect that fits.
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
from wan_runtime.header import Entry, Header
from wan_runtime.names import naming_of, to_original

INPUT_SCALES = ("input_scale", "scale_input", "input_global_scale")
ORDER = {"weight": "", "bias": "~"}  # the weight comes first, the bias last, scales between them by name
CODES = {"nvfp4": "e2m1", "mxfp4": "e2m1", "mxfp6": "e3m2", "int4": "int4"}  # and the others fp32: a cast
NOT_SCALES = ("weight", "bias", "comfy_quant", *INPUT_SCALES)


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
    layers    block Linear -> leaf ("weight", "bias", "weight_scale", ...) -> header entry.
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
    layers: Mapping[str, Mapping[str, Entry]]

    @property
    def decided(self) -> Reading | None:
        """The reading, where there is exactly one."""
        return self.readings[0] if len(self.readings) == 1 else None

    @property
    def quantised(self) -> int:
        """How many block Linears are stored in one byte or less a weight."""
        return sum(
            parts["weight"].dtype in ("F8_E4M3", "F8_E5M2", "U8", "I8") for parts in self.layers.values()
        )

    def scale_names(self, layer: str) -> tuple[str, ...]:
        """The leaves beside a layer's weight that scale it."""
        return tuple(leaf for leaf in self.layers[layer] if leaf not in NOT_SCALES)

    def to_dict(self, layer: str) -> dict[str, object]:
        """Everything but the layers, of which only the representative one is given."""
        fields = dataclasses.asdict(dataclasses.replace(self, layers={}))
        del fields["layers"]
        shown = {leaf: {"dtype": e.dtype, "shape": list(e.shape)} for leaf, e in self.layers[layer].items()}
        return {**fields, "layer": shown}


def anatomy_of(path: Path | str) -> Anatomy:
    """Take a file apart. Raises CheckpointError when it is no safetensors file of a WAN transformer."""
    header = read_header(path)
    spelling, prefix = naming_of(header.path, header.entries)
    entries = {
        to_original(spelling, key.removeprefix(prefix)): entry for key, entry in header.entries.items()
    }
    layers = _layers(entries)
    opened, evidence = _openings(header)
    leaves = Counter(leaf for parts in layers.values() for leaf in parts)
    return Anatomy(
        path=str(header.path),
        bytes=header.nbytes,
        tensors=len(entries),
        names=spelling.name,
        prefix=prefix,
        variant=opened[0].variant.name if opened else None,
        readings=tuple(_reading(checkpoint) for checkpoint in opened),
        evidence=evidence,
        markers=_markers(header, leaves),
        scales={leaf: count for leaf, count in leaves.items() if leaf not in NOT_SCALES},
        input_scales=sum(leaves[leaf] for leaf in INPUT_SCALES),
        biases=_dtypes(entries, lambda path: path.endswith(".bias") and ".norm" not in path),
        norms=_dtypes(entries, lambda path: ".norm" in path),
        modulation=_dtypes(entries, lambda path: path.endswith("modulation")),
        layers=layers,
    )


def _layers(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    layers: dict[str, dict[str, Entry]] = {}
    for path, entry in entries.items():
        module, _, leaf = path.rpartition(".")
        if rules.swaps(module):
            layers.setdefault(module, {})[leaf] = entry
    return {
        module: dict(sorted(parts.items(), key=lambda item: ORDER.get(item[0], item[0])))
        for module, parts in layers.items()
        if "weight" in parts
    }


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
    keys = {source.slot: source.key.rpartition(".")[2] for source in layer.sources}
    nibble = f", {layout['nibble']} nibble" if "nibble" in layout else ""
    formula = f"W = {CODES.get(held, 'fp32')}({keys['payload']}{nibble})"
    if "block_scale" in keys:
        kind = "e8m0" if held.startswith("mx") else "fp32"
        formula += f" * {kind}({keys['block_scale']}, {layout.get('block scales', 'plain')})"
    if "alpha" in keys:  # LightX2V's product of two is the scale
        return f"{formula} * {keys['alpha']} * {keys['input_global_scale']}"
    scale = keys.get("scale", keys.get("weight_global_scale", keys["payload"]))
    if scale == "weight_global_scale":
        return f"{formula} / {scale}"
    return formula if scale == keys["payload"] else f"{formula} * {scale}"


def _markers(header: Header, leaves: Mapping[str, int]) -> tuple[str, ...]:
    """What in the file names its producer."""
    found = [f"header {name}" for name in header.metadata if name != "format"]
    found += (
        ["tensor scaled_fp8"] if any(k.rpartition(".")[2] == "scaled_fp8" for k in header.entries) else []
    )
    found += [f"comfy_quant x {leaves['comfy_quant']}"] if leaves.get("comfy_quant") else []
    found += ["config.json quantization_config"] if "quantization_config" in header.config else []
    return tuple(found)


def _dtypes(entries: Mapping[str, Entry], wanted: Callable[[str], bool]) -> dict[str, int]:
    return dict(Counter(entry.dtype for path, entry in entries.items() if wanted(path)))
