"""optimum-quanto (E1), as Wan2GP and optimum write it.

key              dtype, shape                                meaning
X.weight._data   I8, F8_E4M3 or F8_E5M2 [out, in]            codes
X.weight._scale  BF16, F16 or F32 [out, 1] (also [] or [1])  W = code * scale
X.input_scale    float [], 1 where activations are kept      activation amax / 127; 1 is a placeholder and is dropped
X.output_scale   float []                                    quantises the layer's output, which is not done here

The mark is the key pair. A map of module -> {"weights": "qint8", ...} lies in the header as `quantization_map_base64`
beside `quantization_format` = quanto, or in a sidecar `<file>_map.json`; what it says of a layer must be what is there.
qint4 and qint2 (`X.weight._data._data`, `_shift`) are refused by name.
Source: optimum-quanto 0.2.7, nn/qmodule.py and tensor/qbytes.py; mmgp 3.8.2, safetensors2.py and offload.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header
from wan_runtime.names import without_prefix

FORMATS = {"I8": "int8", **_keys.FP8}
QTYPES = {"I8": ("qint8",), "F8_E4M3": ("qfloat8", "qfloat8_e4m3fn"), "F8_E5M2": ("qfloat8_e5m2",)}
HEADER_MAP = "quantization_map_base64"
LARGEST_MAP = 10_000_000


def detect(header: Header) -> Evidence | None:
    if not any(key.endswith(".weight._data") for key in header.entries):
        return None
    said = header.metadata.get("quantization_format") == "quanto"
    return Evidence(True, f"weights are under .weight._data{', and the header says quanto' if said else ''}")


def read(header: Header) -> Reading:
    recorded = _map(header)
    layers = {}
    for key in header.entries:
        if key.endswith(".weight._data"):
            path = key.removesuffix(".weight._data")
            layers[path] = _layer(header, path, recorded.get(without_prefix(path)))
    used = {source.key for layer in layers.values() for source in layer.sources}
    markers = [key for key in header.entries if key not in used and _placeholder(header, key)]
    return _keys.reading(header, layers, tuple(markers))


def _layer(header: Header, path: str, recorded: str | None) -> Layer:
    key, scale = f"{path}.weight._data", f"{path}.weight._scale"
    entry = header.entries[key]
    if entry.dtype not in FORMATS or len(entry.shape) != 2:
        raise BadTensor(
            header.path,
            key,
            f"quanto's codes are I8 or fp8 [out, in]; these are {entry.dtype} {list(entry.shape)}.",
        )
    if scale not in header.entries or header.entries[scale].dtype not in _keys.FLOAT:
        raise BadTensor(
            header.path, key, f"its scale {scale} is missing or no float; without it the layer is noise."
        )
    if recorded is not None and recorded not in QTYPES[entry.dtype]:
        raise BadTensor(header.path, key, f"it is {entry.dtype}, and the quantisation map says {recorded!r}.")
    sources = [Source(key, "payload", _keys.code_slot), Source(scale, "scale", _keys.scale_slot)]
    static = f"{path}.input_scale"
    if static in header.entries and not _placeholder(header, static):
        sources.append(Source(static, "input_scale", _keys.scalar_slot))
    return Layer(path, FORMATS[entry.dtype], (entry.shape[0], entry.shape[1]), tuple(sources))


def _placeholder(header: Header, key: str) -> bool:
    """Whether a key changes nothing here: an output's scale, or an input scale that was never calibrated."""
    entry = header.entries[key]
    if _keys.leaf(key) not in ("input_scale", "output_scale") or entry.numel != 1:
        return False
    return _keys.leaf(key) == "output_scale" or float(header.read_tensor(key)) == 1


def _map(header: Header) -> dict[str, str]:
    """Module path without prefix -> the name of its weights' type, from the header or the sidecar."""
    text = header.metadata.get(HEADER_MAP)
    sidecar = header.path.with_name(f"{header.path.stem}_map.json")
    try:
        if text is not None:
            fields: Any = json.loads(base64.b64decode(text, validate=True))
        elif sidecar.is_file() and sidecar.stat().st_size < LARGEST_MAP:
            fields = json.loads(sidecar.read_text())
        else:
            return {}
        return {without_prefix(path): str(record["weights"]) for path, record in fields.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        where = f"the header's {HEADER_MAP}" if text is not None else str(sidecar)
        raise CheckpointError(
            header.path, f"{where} is no quantisation map ({error!r}); the file is damaged."
        ) from error


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("quanto files are read, not written")


DIALECT = Dialect(
    name="quanto",
    row="E1",
    meaning="quanto: int8 or fp8 codes with one scale an output channel",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=lambda layers: Marks(),
)
