"""How a layer's weight is computed from the file's own keys, in one line that a user can put into another loader."""

from __future__ import annotations

from collections.abc import Mapping

from wan_runtime.dialects import Layer

CODES = {"nvfp4": "e2m1", "mxfp4": "e2m1", "mxfp6": "e3m2", "int4": "int4"}  # and the others fp32: a cast
CORRECTIONS = ("rotation", "pre_scale", "low_rank_a", "low_rank_b")
SCALES = (
    "relative",
    "scale",
    "second",
    "alpha",
    "input_global_scale",
    "weight_global_scale",
)  # the last divides


def formula(layer: Layer, layout: Mapping[str, str]) -> str:
    """W = ... of a quantised layer; `layout` is what its dialect says of nibbles and block scales."""
    keys = {source.slot: source.key.removeprefix(f"{layer.module}.") for source in layer.sources}
    weight = _codes(layer.format, keys, layout)
    if "block_scale" in keys:
        kind = "e8m0" if layer.format.startswith("mx") else "fp32"
        weight += f" * {kind}({keys['block_scale']}, {layout.get('block scales', 'plain')})"
    weight += _scales(keys)
    return f"W = {_corrected(weight, keys)}"


def _codes(held: str, keys: Mapping[str, str], layout: Mapping[str, str]) -> str:
    payload, zero = keys["payload"], keys.get("zero_point")
    if held.startswith("ggml_"):
        return f"{held.removeprefix('ggml_')} blocks({payload})"
    nibble = f", {layout['nibble']} nibble" if "nibble" in layout else ""
    code = f"{CODES.get(held, 'fp32')}({payload}{nibble})"
    return f"({code} - {zero})" if zero else code


def _scales(keys: Mapping[str, str]) -> str:
    """What multiplies the codes beside a block scale, and what else goes into the weight."""
    doubled = (
        "weight_global_scale" if "alpha" in keys else "input_global_scale"
    )  # said by the others, or the input's
    named = [
        keys[slot] for slot in SCALES if slot in keys and slot != doubled and keys[slot] != keys["payload"]
    ]
    text = "".join(f" {'/' if leaf == 'weight_global_scale' else '*'} {leaf}" for leaf in named)
    understood = {"payload", "block_scale", "input_scale", "spare", "zero_point", *SCALES, *CORRECTIONS}
    others = [leaf for slot, leaf in keys.items() if slot not in understood and leaf not in named]
    others += [keys["low_rank_b"]] if "low_rank_b" in keys and "low_rank_a" not in keys else []
    return text + (f", with {' and '.join(others)}" if others else "")


def _corrected(weight: str, keys: Mapping[str, str]) -> str:
    if "rotation" in keys:
        weight = f"({weight}) @ R"
    if "low_rank_a" in keys:
        weight = f"({weight} + {keys['low_rank_b']} @ {keys['low_rank_a']})"
    return f"{weight} * {keys['pre_scale']}" if "pre_scale" in keys else weight
