"""Files that are recognised and not read: who wrote them, why they are refused, and what to do instead.

Each is known by key names or by config.json, never by shapes. A file that a dialect reads has none of these marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wan_runtime.errors import UnreadDialect
from wan_runtime.header import Header

CODES = ("U8", "I8", "I16", "I32", "F8_E4M3", "F8_E5M2")
CONVERT = "convert the original bf16 file with `wan-runtime convert`"


@dataclass(frozen=True)
class Unread:
    """One kind of file that is refused by name. `marked` says by which keys, or None when it is another kind."""

    tool: str
    row: str
    marked: Callable[[Header], str | None]
    why: str
    remedy: str


def refuse(header: Header) -> None:
    """Raise UnreadDialect for a file of a kind listed here."""
    for kind in KINDS:
        found = kind.marked(header)
        if found is not None:
            raise UnreadDialect(header.path, kind.tool, found, kind.why, kind.remedy)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _with_leaves(*names: str) -> Callable[[Header], str | None]:
    """Files in which every one of these last components of a key occurs."""

    def marked(header: Header) -> str | None:
        found = {_leaf(key) for key in header.entries}
        return f"keys ending in {', '.join(f'.{name}' for name in names)}" if set(names) <= found else None

    return marked


def _any_key(*parts: str) -> Callable[[Header], str | None]:
    """Files with a key that contains one of these parts."""

    def marked(header: Header) -> str | None:
        return next(
            (f"the key {key!r}" for key in header.entries if any(part in key for part in parts)), None
        )

    return marked


def _method(name: str) -> Callable[[Header], str | None]:
    """Files beside a config.json with this quant_method."""

    def marked(header: Header) -> str | None:
        config = header.config.get("quantization_config")
        here = isinstance(config, Mapping) and config.get("quant_method") == name
        return f"config.json's quant_method {name!r}" if here else None

    return marked


def _either(*ways: Callable[[Header], str | None]) -> Callable[[Header], str | None]:
    return lambda header: next((found for way in ways if (found := way(header)) is not None), None)


def _sdnq_keys(header: Header) -> str | None:
    """Codes under .weight with their scale under .scale, which is SDNQ's pair of names."""
    for key, entry in header.entries.items():
        scale = f"{key.rpartition('.')[0]}.scale"
        if _leaf(key) == "weight" and entry.dtype in CODES and scale in header.entries:
            return f"the keys {key!r} and {scale!r}"
    return None


KINDS = (
    Unread(
        tool="nunchaku (SVDQuant)",
        row="K1",
        marked=_with_leaves("qweight", "wscales"),
        why="its codes are permuted for its own kernels, and nothing but those kernels says how",
        remedy=f"use another release of the model, or {CONVERT}",
    ),
    Unread(
        tool="GPTQ or AWQ",
        row="-",
        marked=_with_leaves("qweight", "qzeros"),
        why="its packed integers are not read",
        remedy=f"use another release of the model, or {CONVERT}",
    ),
    Unread(
        tool="LightX2V's int4-g128-marlin",
        row="D8",
        marked=_any_key(".weight_workspace"),
        why="its codes are in the tiles of Marlin's kernel",
        remedy=f"use LightX2V's fp8, int8 or nvfp4 release of the model, or {CONVERT}",
    ),
    Unread(
        tool="bitsandbytes",
        row="L2",
        marked=_either(_any_key(".weight.absmax", ".quant_state.bitsandbytes__"), _with_leaves("SCB")),
        why="its codes, tables and nested scales are not read",
        remedy=f"use an fp8, int8 or GGUF release of the model, or {CONVERT}",
    ),
    Unread(
        tool="Model Optimizer's own state, not exported",
        row="C6",
        marked=_any_key("_quantizer._amax", "_quantizer._scale", "_quantizer._pre_quant_scale"),
        why="the weights beside its calibration are not final",
        remedy="export it with modelopt.torch.export.export_hf_checkpoint, and load the folder that this writes",
    ),
    Unread(
        tool="Transformer Engine",
        row="J1",
        marked=_either(_with_leaves("_extra_state"), _any_key(".rowwise_data", ".rowwise_scale_inv")),
        why="its extra state is pickled and belongs to one version of it",
        remedy="save the weights in bf16 from the script that holds the model; patch() then quantises them",
    ),
    Unread(
        tool="SDNQ, or of a tool with its key names",
        row="L1",
        marked=_either(_method("sdnq"), _with_leaves("svd_up", "svd_down"), _sdnq_keys),
        why="each layer's type, group size and rotation lie in its own configuration, which is not read",
        remedy=f"load it with the sdnq package, or {CONVERT}",
    ),
    Unread(
        tool="quanto's qint4 or qint2",
        row="E1",
        marked=_any_key(".weight._data._data"),
        why="its packed groups are not read",
        remedy=f"use the qint8 release of the model, or {CONVERT}",
    ),
)
