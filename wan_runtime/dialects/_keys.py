"""What the dialects share: grouping keys by module, and the checks and decodings that several producers need."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch

from wan_runtime.dialects import Layer, Reading, Source
from wan_runtime.errors import BadTensor, UnaccountedTensors
from wan_runtime.header import DTYPES, Entry, Header

FP8 = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
CODES = {"fp8": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}  # format -> the dtype of its codes in a file
FLOAT = ("F32", "BF16", "F16", "F64")
# Leaves that change what a weight means, beside every leaf with "scale" in its name; left over, they are an error.
MEANINGFUL = frozenset(
    ("alpha", "weight_packed", "weight_zeros", "zero_point", "weight_s_rel", "weight_s_channel", "weight_codebook",
     "svdquant_lora_a", "svdquant_lora_b", "_amax", "comfy_quant", "proj_down", "proj_up", "smooth_factor")
)  # fmt: skip

UNMARKED = "Its NVFP4 layers carry no producer's mark, and the readings have the same shapes."


def leaf(key: str) -> str:
    return key.rpartition(".")[2]


def module(key: str) -> str:
    return key.rpartition(".")[0]


def leaves(header: Header) -> set[str]:
    return {leaf(key) for key in header.entries}


def is_scale(key: str) -> bool:
    """Whether a key is some producer's scale; diffusers' modulation table has the word in its name and is none."""
    return "scale" in leaf(key) and leaf(key) != "scale_shift_table"


def is_linear_weight(key: str, entry: Entry) -> bool:
    return leaf(key) == "weight" and len(entry.shape) == 2


def scale_slot(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """A scale of one element, [out] or [out, 1] -> fp32 [1, 1] or [out, 1].

    The shape decides, not the count: a scale a 64 x 64 block of a [dim, 4096] weight has `dim` elements too.
    """
    if tensor.numel() != 1 and tuple(tensor.shape) not in ((out,), (out, 1)):
        raise ValueError(
            f"a scale of shape {list(tensor.shape)} fits neither one a tensor nor one an output channel ({out})."
        )
    return tensor.float().reshape(-1, 1)


def scalar_slot(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """A scale of one element -> fp32 [1, 1]."""
    if tensor.numel() != 1:
        raise ValueError(f"a global scale must have one element; this has shape {list(tensor.shape)}.")
    return tensor.float().reshape(1, 1)


def code_slot(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Codes of any one-byte dtype -> uint8, same bytes."""
    return tensor.view(torch.uint8)


def fp8_layer(header: Header, path: str, scale: str, input_leaf: str, weight_format: str = "") -> Layer:
    """An FP8 layer whose scale leaf is `scale`; the scale must be there (a missing one renders as noise).

    The weight's dtype decides between e4m3 and e5m2; `weight_format` does for codes stored as U8.
    """
    key = f"{path}.weight"
    entry = header.entries[key]
    if f"{path}.{scale}" not in header.entries:
        raise BadTensor(
            header.path,
            key,
            f"it is {entry.dtype} and has no scale ({path}.{scale} is missing) while other layers of this file have "
            f"theirs{_nearest(header, path, scale, {'weight'})}. Without its scale the layer is noise.",
        )
    _refuse_coded_scale(header, f"{path}.{scale}")
    sources = [Source(key, "payload", code_slot), Source(f"{path}.{scale}", "scale", scale_slot)]
    sources += input_scale(header, path, input_leaf)
    shape = (entry.shape[0], entry.shape[1])
    return Layer(path, FP8.get(entry.dtype, weight_format), shape, tuple(sources))


def _nearest(header: Header, path: str, leaf: str, others: set[str]) -> str:
    """What a message adds of a missing leaf: the layer's nearest key that is none of its `others`."""
    # Only the layer's own keys: the same key of the next layer is always near, and says nothing.
    known = {f"{path}.{other}" for other in others}
    own = [key for key in header.entries if module(key) == path and key not in known]
    near = difflib.get_close_matches(f"{path}.{leaf}", own, n=1, cutoff=0.8)
    return f"; the nearest key is {near[0]!r}" if near else ""


def _refuse_coded_scale(header: Header, key: str) -> None:
    """E8M0 or byte scales belong to other formats, such as MXFP8."""
    if header.entries[key].dtype not in FLOAT:
        raise BadTensor(
            header.path,
            key,
            f"this scale must be a float; it is {header.entries[key].dtype} {list(header.entries[key].shape)}, "
            "as MXFP8 and other block formats have, which are not read.",
        )


def nvfp4_layer(header: Header, path: str, payload: Source, block_scale: Source) -> Layer:
    """An NVFP4 layer with `weight_scale` and `weight_scale_2`; nibble order and layout come with the sources."""
    for needed, leaf_name in (
        (block_scale.key, "weight_scale"),
        (f"{path}.weight_scale_2", "weight_scale_2"),
    ):
        if needed not in header.entries:
            near = _nearest(
                header, path, leaf_name, {"weight", "weight_scale", "weight_scale_2", "input_scale"}
            )
            raise BadTensor(
                header.path,
                f"{path}.weight",
                f"it is packed NVFP4 and its {leaf_name} is missing{near}. Without its scales the layer is noise.",
            )
    entry, scales = header.entries[f"{path}.weight"], header.entries[block_scale.key]
    if entry.dtype != "U8" or len(entry.shape) != 2:
        raise BadTensor(
            header.path,
            f"{path}.weight",
            f"NVFP4 needs U8 [out, in/2]; it is {entry.dtype} {list(entry.shape)}.",
        )
    if scales.dtype != "F8_E4M3":
        raise BadTensor(
            header.path, block_scale.key, f"NVFP4 block scales are F8_E4M3; these are {scales.dtype}."
        )
    _refuse_coded_scale(header, f"{path}.weight_scale_2")
    sources = (payload, block_scale, Source(f"{path}.weight_scale_2", "scale", scalar_slot))
    shape = (entry.shape[0], entry.shape[1] * 2)
    return Layer(path, "nvfp4", shape, (*sources, *input_scale(header, path, "input_scale")))


def postprocessed(header: Header) -> bool:
    """Whether the header says Model Optimizer after its ComfyUI post-process (C5), of a file with NVFP4 layers.

    Whatever other marks say, its nibbles are the producer's own, and its block scales swizzled or plain.
    """
    return "quantization_config" in header.metadata and "weight_scale_2" in leaves(header)


def input_scale(header: Header, path: str, leaf_name: str) -> list[Source]:
    """The source of a layer's static input scale, where it has one."""
    key = f"{path}.{leaf_name}"
    if key not in header.entries:
        return []
    _refuse_coded_scale(header, key)
    return [Source(key, "input_scale", scalar_slot)]


def reading(
    header: Header, layers: Mapping[str, Layer], markers: tuple[str, ...] = (), *, fp8_rank: int = 1
) -> Reading:
    """Account for every key. What is in no layer and no marker must be a floating-point tensor of its own.

    A scale, or another tensor that may change what a weight means, may not be left over. Tensors of up to `fp8_rank`
    dimensions may be stored in fp8 without a scale: beside scaled layers only biases and norms, which nobody scales.
    """
    used = {source.key for layer in layers.values() for source in layer.sources} | set(markers)
    rest = [key for key in header.entries if key not in used]
    stray = [key for key in rest if is_scale(key) or leaf(key) in MEANINGFUL or _belongs(key, layers)]
    if stray:
        raise UnaccountedTensors(
            header.path,
            unconsumed=stray,
            hint="Each may change what a weight means, and this dialect gives it no meaning: keys were renamed or "
            "lost, or another tool wrote the file. Nothing was loaded.",
        )
    bare = [k for k in rest if header.entries[k].dtype in FP8 and len(header.entries[k].shape) > fp8_rank]
    if bare:
        raise BadTensor(
            header.path,
            bare[0],
            f"it is {header.entries[bare[0]].dtype} and has no scale, which this dialect gives every fp8 tensor of its "
            "kind. Without its scale it is noise.",
        )
    odd = [key for key in rest if header.entries[key].dtype not in (*FLOAT, *FP8)]
    if odd:
        kinds = sorted({header.entries[key].dtype for key in odd})
        raise UnaccountedTensors(
            header.path,
            unconsumed=odd,
            hint=f"They are {', '.join(kinds)}, which this dialect gives no meaning.",
        )
    return Reading(dict(layers), tuple(rest), markers)


def encode(weight_format: str, slots: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical slots under the leaves that Comfy and Model Optimizer share; NVFP4 in the canonical layout."""
    encoded = {"weight": slots["payload"]}
    if weight_format == "nvfp4":
        encoded["weight_scale"] = slots["block_scale"].view(torch.float8_e4m3fn)
        encoded["weight_scale_2"] = slots["scale"].reshape(())
    else:
        encoded["weight"] = slots["payload"].view(DTYPES[CODES[weight_format]])
        encoded["weight_scale"] = slots["scale"].reshape(())
    if "input_scale" in slots:
        encoded["input_scale"] = slots["input_scale"].reshape(())
    return encoded


def _belongs(key: str, layers: Mapping[str, Layer]) -> bool:
    """Whether a key lies in a quantised layer and is not its bias."""
    parts = key.split(".")
    inside = any(".".join(parts[:n]) in layers for n in range(1, len(parts)))
    return inside and not (parts[-1] == "bias" and module(key) in layers)
