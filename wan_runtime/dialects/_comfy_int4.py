"""ComfyUI's formats of 4-bit integers (B5 to B7); two codes share a byte, the EVEN element in the LOW nibble.

convrot_w4a4    weight I8 [out, in / 2]: signed codes -7..7; weight_scale [out]: W = (code * scale) @ R
asym_w4a8_int8  weight I8 [out, in / 2]: unsigned codes; weight_s_rel E4M3, U8 or F32 [out, in / g], g 16;
                weight_s_channel F32 [out]; weight_codebook F32 [16], optional, otherwise code - 8:
                W = (round(codebook[code] * s_rel) within +-127) * s_channel @ R
                weight_correction F32 [in / g, out], optional: added to the weights of its group before R
                weight I8 [out, 3 * in / 4], "W6A8": each row's nibbles, then 2 high bits a code, four in a byte from
                the lowest; code - 32, no codebook
awq_w4a16       weight I8 or U8 [out, in / 2]: unsigned codes; weight_scale, weight_zeros [in / g, out], g 64:
                W = (code - 8) * scale + zero

R is the block-diagonal regular Hadamard matrix in groups of convrot_groupsize. What the middle one decodes to are int8
codes with a scale a row, exactly, and that is how it is held: a byte a weight. Its correction is a low-rank branch:
one direction a group, turned by R.
Source: comfy-kitchen, tensor/convrot_w4a4.py, backends/eager/w4a8_int8.py and tensor/awq_w4a16.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from wan_runtime import corrections
from wan_runtime.dialects import Layer, Source, _keys
from wan_runtime.dialects._comfy_records import Record
from wan_runtime.dialects._comfy_scheme import Scheme, rotation
from wan_runtime.errors import BadTensor
from wan_runtime.header import Header


def _present(header: Header, path: str, record: Record, *leaves: str) -> None:
    missing = [leaf for leaf in leaves if f"{path}.{leaf}" not in header.entries]
    if missing:
        raise BadTensor(
            header.path,
            f"{path}.weight",
            f"it is {record['format']} and its {', '.join(missing)} is missing.",
        )


def _convrot_w4a4(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    _present(header, path, record, "weight_scale")
    rows, cols = header.entries[f"{path}.weight"].shape
    scale = f"{path}.weight_scale"
    sources = (
        Source(f"{path}.weight", "payload", _offset_codes),
        Source(scale, "scale", _row_scale),
        Source(scale, "zero", lambda tensor, out, inp: torch.zeros(out, 1, device="cpu")),
        *rotation(header, path, record, always=True),
    )
    return Layer(path, "int4", (rows, cols * 2), sources), None


def _offset_codes(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Signed nibbles -8..7 -> the same plus 8."""
    return tensor.view(torch.uint8) ^ 0x88


def _row_scale(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    if tuple(tensor.shape) not in ((out,), (out, 1)):
        raise ValueError(f"a scale for each of {out} rows is needed; this has shape {list(tensor.shape)}.")
    return tensor.float().reshape(out, 1)


def _awq_w4a16(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    _present(header, path, record, "weight_scale", "weight_zeros")
    rows, cols = header.entries[f"{path}.weight"].shape
    sources = (
        Source(f"{path}.weight", "payload", _keys.code_slot),
        Source(f"{path}.weight_scale", "scale", _turned),
        Source(f"{path}.weight_zeros", "zero", _turned),
    )
    groups = header.entries[f"{path}.weight_scale"].shape[:1]
    group = cols * 2 // groups[0] if groups and groups[0] else None
    if record.get("group_size") is None and group != 64:
        raise BadTensor(
            header.path,
            f"{path}.weight_scale",
            f"without a group_size in its record the groups are of 64; these are of {group}.",
        )
    return Layer(path, "int4", (rows, cols * 2), sources), group


def _turned(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """[groups, out] -> fp32 [out, groups]."""
    if tensor.dim() != 2 or tensor.shape[1] != out:
        raise ValueError(f"[groups, {out}] is needed; this has shape {list(tensor.shape)}.")
    return tensor.float().t().contiguous()


def _asym_w4a8(header: Header, path: str, record: Record) -> tuple[Layer, int | None]:
    _present(header, path, record, "weight_s_rel", "weight_s_channel")
    rows, width = header.entries[f"{path}.weight"].shape
    relative = header.entries[f"{path}.weight_s_rel"]
    group = record.get("group_size", 16)
    inp = relative.shape[1] * group if len(relative.shape) == 2 and type(group) is int else 0
    bits = next((bits for bits in (4, 6) if inp and inp * bits == width * 8), 0)
    if not bits or relative.dtype not in ("F8_E4M3", "U8", *_keys.FLOAT):
        raise BadTensor(
            header.path,
            f"{path}.weight_s_rel",
            f"{relative.dtype} {list(relative.shape)} in groups of {group!r} does not go with [{rows}, {width}] bytes "
            "of 4-bit or 6-bit codes.",
        )
    sources = [
        Source(f"{path}.weight", "payload", _keys.code_slot),
        Source(f"{path}.weight_s_rel", "relative", _relative),
        Source(f"{path}.weight_s_channel", "scale", _row_scale),
        *rotation(header, path, record, always=True),
    ]
    for name, slot, decode in (("codebook", "codebook", _codebook), ("correction", "low_rank_b", _turned)):
        if f"{path}.weight_{name}" in header.entries:
            sources.append(Source(f"{path}.weight_{name}", slot, decode))
    finish = functools.partial(_decoded, group, bits)
    return Layer(path, "int8", (rows, inp), tuple(sources), finish), group


def _relative(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    """Scales of groups [out, groups] -> fp32."""
    values = (tensor.view(torch.float8_e4m3fn) if tensor.dtype is torch.uint8 else tensor).float()
    if values.shape[0] != out or not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(
            "the scales of its groups must be finite and not negative, a row of them for each output."
        )
    return values


def _codebook(tensor: torch.Tensor, out: int, inp: int) -> torch.Tensor:
    if tensor.numel() != 16 or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"a codebook of 16 finite values is needed; this has shape {list(tensor.shape)}.")
    return tensor.float().reshape(16)


def _decoded(group: int, bits: int, given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Codes, tables and scales of groups -> int8 codes, what the producer's own kernels decode to."""
    relative, codebook = given["relative"], given.get("codebook")
    if codebook is not None and bits == 6:
        raise ValueError("codes of 6 bits have no codebook.")
    codes = _unpacked(given["payload"], relative.shape[1] * group, bits)
    values = codes.float() - 2.0 ** (bits - 1) if codebook is None else codebook[codes.int()]
    grouped = values.reshape(*relative.shape, group) * relative[..., None]
    whole = grouped.round().clamp(-127, 127).to(torch.int8).reshape(codes.shape).view(torch.uint8)
    slots = {"payload": whole, "scale": given["scale"], "rotation": given["rotation"]}
    if "low_rank_b" in given:
        each = torch.eye(relative.shape[1], device=relative.device).repeat_interleave(group, dim=1)
        turned = corrections.rotate(each, corrections.group_of(given))
        slots |= {"low_rank_a": turned, "low_rank_b": given["low_rank_b"]}
    return slots


def _unpacked(packed: torch.Tensor, inp: int, bits: int) -> torch.Tensor:
    """Bytes of a row -> its codes, uint8 [out, in]."""
    low = packed[:, : inp // 2]
    codes = torch.stack((low & 0xF, low >> 4), dim=-1).reshape(-1, inp)
    if bits == 6:
        high = packed[:, inp // 2 :]
        tops = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).reshape(-1, inp)
        codes = codes | (tops << 4)
    return codes


SCHEMES: Mapping[str, Scheme] = {
    "convrot_w4a4": Scheme(
        _convrot_w4a4,
        ("I8", "U8"),
        frozenset({"convrot", "convrot_groupsize", "quant_group_size", "linear_dtype"}),
    ),
    "asym_w4a8_int8": Scheme(_asym_w4a8, ("I8", "U8"), frozenset({"convrot", "convrot_groupsize"})),
    "awq_w4a16": Scheme(_awq_w4a16, ("I8", "U8")),
}
