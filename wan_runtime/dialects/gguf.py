"""GGUF (M1), as ComfyUI-GGUF, llama.cpp's quantiser and calcuis' tools write WAN models, under the original names.

key        type                                    meaning
X.weight   Q8_0, Q4_0, Q4_1, Q5_0, Q5_1,           ggml's blocks, kept as they are (wan_runtime/formats/_ggml.py)
           Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
any        F32, F16, BF16                          as it is

The container says each tensor's type; no scale lies in a key of its own. A file of floats alone is `plain`. Types not
in the list (IQ*, TQ*, MXFP4, NVFP4) and blocks in what is no matrix are refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.header import Header

METADATA = (
    "gguf"  # what the container writes there: {"architecture": ..., "tensors": {key: {"type", "shape"}}}
)
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def detect(header: Header) -> Evidence | None:
    said = _said(header)
    if not said.get("tensors"):
        return None
    kinds = Counter(record["type"] for record in said["tensors"].values())
    listed = ", ".join(f"{kind} x {count}" for kind, count in kinds.most_common())
    return Evidence(True, f"GGUF of architecture {said['architecture']}: {listed}")


def _said(header: Header) -> dict[str, Any]:
    if header.container != "gguf":
        return {}
    said: dict[str, Any] = json.loads(header.metadata[METADATA])
    return said


def read(header: Header) -> Reading:
    said = _said(header)
    if not said:
        raise CheckpointError(header.path, "this is no GGUF file, and only that is read as one.")
    layers = {}
    for key, record in said["tensors"].items():
        kind, shape, path = record["type"], record["shape"], _keys.module(key)
        if kind not in TYPES or len(shape) != 2 or _keys.leaf(key) != "weight":
            raise BadTensor(
                header.path,
                key,
                f"it is {kind} {shape}, which is not read; what is: {', '.join(TYPES)} for the matrices, F32, F16 and "
                "BF16 for everything. Use a release in one of these.",
            )
        source = Source(key, "payload", _keys.code_slot)
        layers[path] = Layer(path, f"ggml_{kind.lower()}", (shape[0], shape[1]), (source,))
    return _keys.reading(header, layers)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("GGUF files are read, not written")


DIALECT = Dialect(
    name="gguf",
    row="M1",
    meaning="GGUF: ggml's blocks, with their scales inside",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=lambda layers: Marks(),
)
