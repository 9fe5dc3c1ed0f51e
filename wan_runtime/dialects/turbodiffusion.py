"""TurboDiffusion (F1): int8 in blocks, under the original names, released as .pth.

key                     dtype, shape                           meaning
X.int8_weight           I8 [out, in]                           codes, -128..127
X.scale                 F32 [ceil(out / 128), ceil(in / 128)]  W = code * scale of its block (amax / 128)
patch_embedding.weight  [dim, in * 4]                          a Linear over flattened (channel, 1, 2, 2) patches: the
                                                               Conv3d's weight by another shape
blocks.N.self_attn.attn_op.local_attn.proj_l.{weight, bias}    sparse-linear attention's learnt branch: refused

A file with proj_l was trained for TurboDiffusion's own attention; its other weights alone are another model.
Source: TurboDiffusion, turbodiffusion/ops/quant/quant.hpp, ops/core.py and inference/modify_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wan_runtime.dialects import Dialect, Evidence, Layer, Marks, Reading, Source, _keys, _scaled
from wan_runtime.errors import BadTensor, UnaccountedTensors
from wan_runtime.header import Header

CODES, SCALE, BRANCH = "int8_weight", "scale", "proj_l"


def detect(header: Header) -> Evidence | None:
    if CODES not in _keys.leaves(header):
        return None
    return Evidence(True, f"int8 weights under .{CODES}, which only TurboDiffusion writes")


def read(header: Header) -> Reading:
    _refuse_branch(header)
    paths = [_keys.module(key) for key in header.entries if _keys.leaf(key) == CODES]
    return _keys.reading(header, {path: _layer(header, path) for path in paths})


def _refuse_branch(header: Header) -> None:
    branch = [key for key in header.entries if BRANCH in key.split(".")]
    if branch:
        raise UnaccountedTensors(
            header.path,
            unconsumed=branch,
            hint="They belong to sparse-linear attention (SLA), which this model was trained with and which is not "
            "computed here; without them it is another model. Use TurboDiffusion's own inference for this file, or a "
            "checkpoint of the model without SLA.",
        )


def _layer(header: Header, path: str) -> Layer:
    key, scale = f"{path}.{CODES}", f"{path}.{SCALE}"
    entry = header.entries[key]
    if entry.dtype != "I8" or len(entry.shape) != 2:
        raise BadTensor(
            header.path, key, f"it must be I8 [out, in]; it is {entry.dtype} {list(entry.shape)}."
        )
    if scale not in header.entries:
        raise BadTensor(header.path, key, f"it is int8 and its scale is missing ({scale}).")
    blocks = (-(-entry.shape[0] // 128), -(-entry.shape[1] // 128))
    given = header.entries[scale]
    if given.dtype not in _keys.FLOAT or given.shape != blocks:
        raise BadTensor(
            header.path,
            scale,
            f"the scales of 128 x 128 blocks of {list(entry.shape)} are F32 {list(blocks)}; these are {given.dtype} "
            f"{list(given.shape)}.",
        )
    sources = (Source(key, "payload", _keys.code_slot), Source(scale, "scale", _scaled.block_scales))
    return Layer(path, "int8_block", (entry.shape[0], entry.shape[1]), sources)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    raise NotImplementedError("TurboDiffusion's files are read, not written")


DIALECT = Dialect(
    name="turbodiffusion",
    row="F1",
    meaning="TurboDiffusion: int8 with a scale a block of 128 x 128",
    detect=detect,
    read=read,
    targets={},
    encode=encode,
    marks=lambda layers: Marks(),
)
