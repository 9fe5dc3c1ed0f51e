"""ComfyUI's integer, rotated and padded formats, musubi-tuner's blocks and Model Optimizer's SVDQuant, written by hand.

Each file is made from docs/formats.md in fp64, apart from the code that reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.codes import E4M3, E8M0, Bytes, Floats, nearest, pack, tile_order
from tests.builders.files import Content, codes_as, comfy, modelopt
from tests.builders.wan import TINY, Sizes, block_linears, state
from wan_runtime.checkpoint import open_checkpoint, read_layer, stream
from wan_runtime.converting import convert
from wan_runtime.corrections import effective_weight
from wan_runtime.dialects import DIALECTS
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.formats import FORMATS

FIRST = "blocks.0.self_attn.q"
Made = tuple[dict[str, torch.Tensor], dict[str, object], Floats]


def hadamard(size: int) -> Floats:
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=np.float64)
    matrix: Floats = four
    while len(matrix) < size:
        matrix = np.asarray(np.kron(matrix, four), dtype=np.float64)
    return np.asarray(matrix / np.sqrt(size))


def turned(weight: Floats, group: int) -> Floats:
    return np.asarray(weight @ np.kron(np.eye(weight.shape[1] // group), hadamard(group)))


def fp32(values: Floats) -> Floats:
    return values.astype(np.float32).astype(np.float64)


def tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def int8_codes(weight: Floats, scale: Floats) -> Bytes:
    return np.asarray(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8).view(np.uint8))


def signed(codes: Bytes) -> Floats:
    return codes.view(np.int8).astype(np.float64)


def int8(weight: Floats) -> Made:
    scale = fp32(np.abs(weight).max().reshape(1, 1) / 127)
    codes = int8_codes(weight, scale)
    leaves = {"weight": codes_as(codes, torch.int8), "weight_scale": tensor(scale).reshape(())}
    return leaves, {"format": "int8_tensorwise"}, signed(codes) * scale


def int8_rotated(weight: Floats) -> Made:
    rotated = turned(weight, 16)
    scale = fp32(np.abs(rotated).max(axis=1, keepdims=True) / 127)
    codes = int8_codes(rotated, scale)
    leaves = {"weight": codes_as(codes, torch.int8), "weight_scale": tensor(scale)}
    record = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "per_row": True}
    return leaves, record, turned(signed(codes) * scale, 16)


def w4a4(weight: Floats) -> Made:
    rotated = turned(weight, 64)
    scale = fp32(np.abs(rotated).max(axis=1, keepdims=True) / 7)
    codes = np.clip(np.rint(rotated / scale), -7, 7)
    nibbles = (codes.astype(np.int8) & 15).astype(np.uint8)
    leaves = {
        "weight": codes_as(pack(nibbles, even_high=False), torch.int8),
        "weight_scale": tensor(scale[:, 0]),
    }
    return leaves, {"format": "convrot_w4a4", "convrot_groupsize": 64}, turned(codes * scale, 64)


def w4a8(weight: Floats) -> Made:
    random = np.random.default_rng(0)
    out, inp = weight.shape
    codes = random.integers(0, 16, weight.shape).astype(np.uint8)
    book = fp32(np.sort(random.normal(size=16)))
    relative = nearest(random.uniform(20, 120, (out, inp // 16)), E4M3)
    channel = fp32(random.uniform(1e-4, 1e-3, (out, 1)))
    # fp32 products, as the producer rounds them: a half is a half only there
    grid = np.float32(book[codes]) * np.repeat(np.float32(E4M3[relative]), 16, axis=1)
    whole = np.clip(np.rint(grid), -127, 127).astype(np.float64)
    leaves = {
        "weight": codes_as(pack(codes, even_high=False), torch.int8),
        "weight_s_rel": codes_as(relative, torch.float8_e4m3fn),
        "weight_s_channel": tensor(channel[:, 0]),
        "weight_codebook": tensor(book),
    }
    record = {"format": "asym_w4a8_int8", "group_size": 16, "convrot": True, "convrot_groupsize": 16}
    return leaves, record, turned(whole * channel, 16)


def awq(weight: Floats) -> Made:
    random = np.random.default_rng(1)
    out, inp = weight.shape
    codes = random.integers(0, 16, weight.shape).astype(np.uint8)
    scale, zero = (fp32(random.uniform(1e-3, 1e-2, (out, inp // 64))) for _ in range(2))
    leaves = {
        "weight": codes_as(pack(codes, even_high=False)),
        "weight_scale": tensor(scale.T),
        "weight_zeros": tensor(zero.T),
    }
    each = (np.repeat(values, 64, axis=1) for values in (scale, zero))
    return leaves, {"format": "awq_w4a16", "group_size": 64}, (codes - 8.0) * next(each) + next(each)


def mxfp8(weight: Floats) -> Made:
    out, inp = weight.shape
    blocks = weight.reshape(out, inp // 32, 32)
    byte = (np.ceil(np.log2(np.abs(blocks).max(axis=2) / 448)) + 127).astype(np.uint8)
    step = E8M0[byte][..., None]
    codes = nearest(blocks / step, E4M3)
    leaves = {
        "weight": codes_as(codes.reshape(out, inp), torch.float8_e4m3fn),
        "weight_scale": codes_as(tile_order(byte)),
    }
    return leaves, {"format": "mxfp8"}, (E4M3[codes] * step).reshape(out, inp)


def hybrid(weight: Floats) -> Made:
    leaves, record, meant = mxfp8(weight)
    return {**leaves, "weight_scalar": torch.tensor(0.01)}, {**record, "format": "hybrid_mxfp8"}, meant


def fp8_grid(weight: Floats, rows: int, cols: int) -> tuple[Bytes, Floats, Floats]:
    out, inp = weight.shape
    blocks = weight.reshape(out // rows, rows, inp // cols, cols)
    scale = fp32(np.abs(blocks).max(axis=(1, 3)) / 448)
    each = scale[:, None, :, None]
    codes = nearest(blocks / each, E4M3)
    return codes.reshape(out, inp), scale, (E4M3[codes] * each).reshape(out, inp)


def blocks(weight: Floats) -> Made:
    codes, scale, meant = fp8_grid(weight, 64, 64)
    leaves = {"weight": codes_as(codes, torch.float8_e4m3fn), "weight_scale": tensor(scale)}
    return leaves, {"format": "float8_e4m3fn_blockwise", "group_size": 64}, meant


def block3d(weight: Floats) -> Made:
    codes, scale, meant = fp8_grid(weight, 1, 64)
    leaves = {"weight": codes_as(codes, torch.float8_e4m3fn), "weight_scale": tensor(scale[..., None])}
    return leaves, {"format": "float8_e4m3fn"}, meant


SCHEMES: dict[str, tuple[str, Callable[[Floats], Made]]] = {
    "int8": ("int8", int8),
    "int8 rotated": ("int8", int8_rotated),
    "convrot_w4a4": ("int4", w4a4),
    "asym_w4a8_int8": ("int8", w4a8),
    "awq_w4a16": ("int4", awq),
    "mxfp8": ("mxfp8", mxfp8),
    "hybrid_mxfp8": ("mxfp8", hybrid),
    "fp8 blocks": ("fp8_block", blocks),
    "fp8 block3d under the plain name": ("fp8_block", block3d),
}


def content(scheme: str, sizes: Sizes = TINY) -> Content:
    made = Content(state(sizes))
    for module in block_linears(sizes):
        leaves, record, meant = SCHEMES[scheme][1](made.tensors[f"{module}.weight"].double().numpy())
        made.tensors |= {f"{module}.{leaf}": value for leaf, value in leaves.items()}
        said(made, module, record)
        made.weights[module] = meant
    return made


def said(made: Content, module: str, record: dict[str, object]) -> None:
    text = json.dumps(record).encode()
    made.tensors[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)


def assert_means(path: Path, made: Content, weight_format: str) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.layers.keys() == made.weights.keys()
    for item in stream(checkpoint, torch.device("cpu")):
        if item.format is None:
            continue
        truth = made.weights[item.path]
        assert item.format == weight_format
        weight = effective_weight(item.format, item.slots).double().numpy()
        np.testing.assert_allclose(weight, truth, rtol=0, atol=2**-20 * np.abs(truth).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_means_what_was_written(tmp_path: Path, scheme: str) -> None:
    made = content(scheme)
    assert_means(made.write(tmp_path), made, SCHEMES[scheme][0])


def test_a_rotated_layer_takes_256_where_its_record_says_no_group(tmp_path: Path) -> None:
    sizes = Sizes(dim=256, ffn=256)
    made = content("convrot_w4a4", sizes)
    for module in made.weights:
        said(made, module, {"format": "convrot_w4a4", "linear_dtype": "int8"})
        made.weights[module] = turned(turned(made.weights[module], 64), 256)  # undone, and done again
    assert_means(made.write(tmp_path), made, "int4")


def test_codes_of_4_bits_without_a_codebook_are_centred_on_8(tmp_path: Path) -> None:
    made = content("asym_w4a8_int8")
    leaves = {k: t for k, t in made.tensors.items() if not k.endswith("codebook")}
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (128, 128)).astype(np.uint8)  # the first that w4a8 draws
    relative = E4M3[made.tensors[f"{FIRST}.weight_s_rel"].view(torch.uint8).numpy()]
    channel = made.tensors[f"{FIRST}.weight_s_channel"].double().numpy()[:, None]
    whole = np.clip(np.rint((codes - 8.0) * np.repeat(relative, 16, axis=1)), -127, 127)
    made.tensors = leaves
    checkpoint = open_checkpoint(made.write(tmp_path))
    weight = effective_weight("int8", read_layer(checkpoint, FIRST)).double().numpy()
    truth = turned(whole * channel, 16)
    np.testing.assert_allclose(weight, truth, rtol=0, atol=2**-20 * np.abs(truth).max())


def test_bytes_may_be_stored_as_bytes(tmp_path: Path) -> None:
    for scheme, leaf in (("mxfp8", "weight"), ("asym_w4a8_int8", "weight_s_rel"), ("convrot_w4a4", "weight")):
        made = content(scheme)
        for module in made.weights:
            made.tensors[f"{module}.{leaf}"] = made.tensors[f"{module}.{leaf}"].view(torch.uint8)
        assert_means(made.write(tmp_path / scheme), made, SCHEMES[scheme][0])


def test_the_input_s_scale_of_nvfp4_is_worked_in(tmp_path: Path) -> None:
    made = comfy(state(), block_linears(), "nvfp4")
    for module, weight in made.weights.items():
        smooth = fp32(np.random.default_rng(0).uniform(0.2, 3, weight.shape[1:]))
        made.tensors[f"{module}.pre_quant_scale"] = tensor(smooth)
        made.weights[module] = weight * smooth
    assert_means(made.write(tmp_path), made, "nvfp4")


@pytest.mark.parametrize("second", [None, 0.37])
@pytest.mark.parametrize("group", [64, 16])
def test_musubi_s_blocks_are_read_and_its_second_scale_multiplied(
    tmp_path: Path, group: int, second: float | None
) -> None:
    made = Content(state())
    for module in block_linears():
        codes, scale, meant = fp8_grid(made.tensors[f"{module}.weight"].double().numpy(), 1, group)
        made.tensors[f"{module}.weight"] = codes_as(codes, torch.float8_e4m3fn)
        made.tensors[f"{module}.scale_weight"] = tensor(scale[..., None])
        made.weights[module] = meant
        if second is not None:
            made.tensors[f"{module}.scale_weight_tensor"] = torch.tensor(second)
            made.weights[module] = meant * np.float32(second)
    path = made.write(tmp_path)
    assert open_checkpoint(path).dialect.name == "comfy_scaled_fp8"
    assert_means(path, made, "fp8_block")


@pytest.mark.parametrize("second", [0.0, -1.0, float("nan")])
def test_musubi_s_second_scale_must_be_a_scale(tmp_path: Path, second: float) -> None:
    made = Content(state())
    codes, scale, made.weights[FIRST] = fp8_grid(made.tensors[f"{FIRST}.weight"].double().numpy(), 1, 64)
    made.tensors[f"{FIRST}.weight"] = codes_as(codes, torch.float8_e4m3fn)
    made.tensors[f"{FIRST}.scale_weight"] = tensor(scale[..., None])
    made.tensors[f"{FIRST}.scale_weight_tensor"] = torch.tensor(second)
    with pytest.raises(BadTensor, match="scale_weight_tensor is"):
        read_layer(open_checkpoint(made.write(tmp_path)), FIRST)


def svd() -> Content:
    made = modelopt(state(), block_linears(), "nvfp4")
    random = np.random.default_rng(0)
    for module, weight in made.weights.items():
        out, inp = weight.shape
        shapes = {"svdquant_lora_a": (4, inp), "svdquant_lora_b": (out, 4), "pre_quant_scale": (inp,)}
        stored = {leaf: tensor(random.uniform(0.1, 0.6, shape)).bfloat16() for leaf, shape in shapes.items()}
        made.tensors |= {f"{module}.{leaf}": value for leaf, value in stored.items()}
        a, b, smooth = [value.double().numpy() for value in stored.values()]
        made.weights[module] = (weight + b @ a) * smooth
    return made


def test_model_optimizer_s_low_rank_branch_takes_the_scaled_input(tmp_path: Path) -> None:
    made = svd()
    assert_means(made.write(tmp_path), made, "nvfp4")
    made.config = None  # no other producer writes these keys
    path = made.write(tmp_path / "alone")
    assert open_checkpoint(path).dialect.name == "modelopt"
    assert_means(path, made, "nvfp4")


def test_half_a_low_rank_branch_is_refused(tmp_path: Path) -> None:
    made = svd()
    del made.tensors[f"{FIRST}.svdquant_lora_b"]
    with pytest.raises(BadTensor, match="svdquant_lora_b is missing"):
        open_checkpoint(made.write(tmp_path))


PADDED = (("nvfp4", 16, 2), ("mxfp8", 32, 1))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("weight_format", "multiple", "packed"), PADDED)
def test_padded_rows_are_cut_off(
    tmp_path: Path, weight_format: str, multiple: int, packed: int, recorded: bool
) -> None:
    """264 rows are stored as 272 or 288; a record may say so, and the bias does."""
    made, module = Content(state(Sizes(ffn=264))), "blocks.0.ffn.0"
    slots = FORMATS[weight_format].quantize(made.tensors[f"{module}.weight"], False)
    leaves = DIALECTS["comfy"].encode(weight_format, slots)
    assert leaves["weight"].shape == (-(-264 // multiple) * multiple, 128 // packed)
    record: dict[str, object] = json.loads(bytes(leaves["comfy_quant"].tolist()))
    assert record == {"format": weight_format, "orig_shape": [264, 128]}
    if not recorded:
        del record["orig_shape"]
    made.tensors |= {f"{module}.{leaf}": value for leaf, value in leaves.items()}
    said(made, module, record)
    checkpoint = open_checkpoint(made.write(tmp_path))
    assert checkpoint.shape_of(f"{module}.weight") == (264, 128)
    assert all(slots[name].equal(held) for name, held in read_layer(checkpoint, module).items())


def test_converting_to_mxfp8_and_back_is_exact(tmp_path: Path) -> None:
    source = Content(state()).write(tmp_path / "source")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    report = convert(source, first, to="mxfp8")
    assert report.dialect == "comfy" and max(report.errors.values()) < 0.04
    assert not convert(first, second, to="mxfp8").errors  # nothing was quantised anew
    made, again = open_checkpoint(first), open_checkpoint(second)
    for path in made.layers:
        slots, twice = read_layer(made, path), read_layer(again, path)
        assert all(twice[name].equal(held) for name, held in slots.items())
    assert {made.header.entries[f"{p}.weight_scale"].dtype for p in made.layers} == {"U8"}


def test_a_rotated_layer_is_converted_from_its_effective_weight(tmp_path: Path) -> None:
    made = content("int8 rotated")
    target = tmp_path / "bf16.safetensors"
    convert(made.write(tmp_path), target, to="bf16")
    written = open_checkpoint(target)
    for module, truth in made.weights.items():
        held = written.header.read_tensor(written.plain[f"{module}.weight"]).double().numpy()
        assert np.linalg.norm(held - truth) < 4e-3 * np.linalg.norm(truth)


DAMAGE: dict[str, tuple[str, dict[str, object], str]] = {
    "a rotation of FP8": ("fp8 blocks", {"format": "float8_e4m3fn_blockwise", "convrot": True}, "asks for convrot"),
    "a rotation of blocks": ("mxfp8", {"format": "mxfp8", "convrot_groupsize": 16}, "asks for convrot_groupsize"),
    "an unrotated w4a4": ("convrot_w4a4", {"format": "convrot_w4a4", "convrot": False}, "cannot mean"),
    "a group that is no number": (
        "int8", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "16"}, "'16'",
    ),
    "blocks of another size": ("fp8 blocks", {"format": "float8_e4m3fn_blockwise", "group_size": 128}, "group_size"),
    "scales a row that are one": ("int8", {"format": "int8_tensorwise", "per_row": True}, "per_row"),
    "another format of int8": ("int8", {"format": "nvfp4"}, "I8"),
    "groups of another size": ("asym_w4a8_int8", {"format": "asym_w4a8_int8", "group_size": 32}, "does not go"),
    "groups of AWQ": ("awq_w4a16", {"format": "awq_w4a16", "group_size": 32}, "group_size"),
    "int8 said to be FP8": ("int8", {"format": "float8_e4m3fn"}, "I8"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_that_disagrees_is_refused(tmp_path: Path, damage: str) -> None:
    scheme, record, message = DAMAGE[damage]
    made = content(scheme)
    said(made, FIRST, record)
    with pytest.raises(BadTensor, match=message) as caught:
        open_checkpoint(made.write(tmp_path))
    assert caught.value.key.startswith(FIRST)


@pytest.mark.parametrize("group", [32, 256, 8])
def test_a_rotation_that_does_not_fit_is_refused(tmp_path: Path, group: int) -> None:
    made = content("int8 rotated")
    said(made, FIRST, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group})
    with pytest.raises(BadTensor, match=f"groups of {group}"):
        read_layer(open_checkpoint(made.write(tmp_path)), FIRST)


@pytest.mark.parametrize(
    ("scheme", "leaf"),
    [(s, leaf) for s in SCHEMES for leaf in ("weight_scale", "weight_s_rel", "weight_s_channel", "weight_zeros",
                                             "weight_scalar")
     if f"{FIRST}.{leaf}" in content(s).tensors],
)  # fmt: skip
def test_a_missing_companion_is_refused(tmp_path: Path, scheme: str, leaf: str) -> None:
    made = content(scheme)
    del made.tensors[f"{FIRST}.{leaf}"]
    with pytest.raises(BadTensor, match=leaf) as caught:
        open_checkpoint(made.write(tmp_path))
    assert caught.value.key == f"{FIRST}.weight"


@pytest.mark.parametrize(
    ("scheme", "leaf", "value"),
    [
        ("asym_w4a8_int8", "weight_s_rel", torch.full((128, 8), float("nan"))),
        ("asym_w4a8_int8", "weight_codebook", torch.full((16,), float("inf"))),
        ("asym_w4a8_int8", "weight_codebook", torch.ones(8)),
        ("asym_w4a8_int8", "weight_s_channel", torch.ones(64)),
        ("asym_w4a8_int8", "weight_s_channel", -torch.ones(128)),
        ("hybrid_mxfp8", "weight_scalar", torch.tensor(float("nan"))),
        ("mxfp8", "weight_scale", torch.full((128, 4), 255, dtype=torch.uint8)),
        ("mxfp8", "weight_scale", torch.full((64, 4), 120, dtype=torch.uint8)),
        ("awq_w4a16", "weight_zeros", torch.full((2, 128), float("nan"))),
        ("awq_w4a16", "weight_zeros", torch.zeros(128, 2)),
        ("convrot_w4a4", "weight_scale", torch.ones(())),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, scheme: str, leaf: str, value: torch.Tensor) -> None:
    made = content(scheme)
    assert f"{FIRST}.{leaf}" in made.tensors
    made.tensors[f"{FIRST}.{leaf}"] = value
    with pytest.raises(BadTensor) as caught:
        read_layer(open_checkpoint(made.write(tmp_path)), FIRST)
    assert caught.value.key.startswith(FIRST)


@pytest.mark.parametrize("leaf", ["weight_mystery", "weight_proj_down", "weight_codebook"])
def test_a_table_that_nothing_reads_is_refused(tmp_path: Path, leaf: str) -> None:
    made = content("int8 rotated")
    made.tensors[f"{FIRST}.{leaf}"] = torch.ones(16)
    with pytest.raises(UnaccountedTensors, match=leaf):
        open_checkpoint(made.write(tmp_path))


def test_an_int8_layer_without_a_record_is_refused(tmp_path: Path) -> None:
    made = content("int8")
    del made.tensors[f"{FIRST}.comfy_quant"]
    with pytest.raises(CheckpointError, match="has no comfy_quant record"):
        open_checkpoint(made.write(tmp_path))
