"""GGUF files, written by the gguf package, against the package's own dequantisation."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wan_runtime
from tests.builders.wan import Sizes, block_linears, state
from wan_runtime.checkpoint import open_checkpoint, read_layer, read_plain, stream
from wan_runtime.containers import read_header
from wan_runtime.corrections import effective_weight
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.formats._ggml import BLOCKS

SIZES = Sizes(dim=256, ffn=512, layers=1)
FIRST = "blocks.0.self_attn.q"
Arrays = dict[str, np.ndarray[Any, Any]]


def _payload(name: str, out: int, inp: int, seed: int) -> np.ndarray[Any, Any]:
    """Random blocks of a type whose weights are of a model's size."""
    block, generator = BLOCKS[name], np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (out * inp // block.weights, block.nbytes), dtype=np.uint8)
    size = 0.01 / 2 ** {"q8_0": 6, "q6_k": 11}.get(name, 8 if name.endswith("k") else 3)
    for at in block.halves:
        halves = generator.normal(0, size, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(out, -1)


def _write(
    path: Path,
    name: str = "q4_k",
    *,
    spelling: str = "original",
    prefix: str = "",
    change: Callable[[gguf.GGUFWriter, Arrays], None] = lambda writer, tensors: None,
) -> tuple[Path, Arrays, Arrays]:
    """A WAN model with its blocks' Linears in one type: the path, the expected weights, the other tensors."""
    tensors = {k: t.numpy() for k, t in state(SIZES, spelling=spelling, prefix=prefix).items()}
    writer = gguf.GGUFWriter(path, "wan")
    kind, expected = gguf.GGMLQuantizationType[name.upper()], {}
    for number, module in enumerate(block_linears(SIZES, spelling, prefix)):
        out, inp = tensors.pop(f"{module}.weight").shape
        payload = _payload(name, out, inp, number)
        expected[module] = gguf.quants.dequantize(payload, kind)
        writer.add_tensor(f"{module}.weight", payload, raw_dtype=kind)
    others = dict(tensors)
    change(writer, tensors)  # it adds some itself, and takes them out
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected, others


@pytest.mark.parametrize("name", BLOCKS)
def test_every_layer_is_what_the_package_dequantises(tmp_path: Path, name: str) -> None:
    path, expected, others = _write(tmp_path / "wan.gguf", name)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.dialect.name, checkpoint.header.container) == ("gguf", "gguf")
    assert f"{name.upper()} x 10" in checkpoint.evidence and "wan" in checkpoint.evidence
    assert checkpoint.layers.keys() == expected.keys() and checkpoint.plain.keys() == others.keys()
    streamed = {item.path: item for item in stream(checkpoint, torch.device("cpu"))}
    for module, truth in expected.items():
        assert checkpoint.layers[module].format == f"ggml_{name}"
        for slots in (read_layer(checkpoint, module), streamed[module].slots):
            np.testing.assert_array_equal(effective_weight(f"ggml_{name}", slots).numpy(), truth)
            assert slots["payload"].dtype is torch.uint8  # the bytes stay as they are in the file
            assert slots["payload"].nbytes == truth.size // BLOCKS[name].weights * BLOCKS[name].nbytes
    for key, truth in others.items():
        np.testing.assert_array_equal(read_plain(checkpoint, key).numpy(), truth)


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_and_prefixes_are_those_of_any_file(tmp_path: Path, spelling: str, prefix: str) -> None:
    path, expected, _ = _write(tmp_path / "wan.gguf", spelling=spelling, prefix=prefix)
    checkpoint = open_checkpoint(tmp_path)  # the folder that holds it
    assert checkpoint.path == path
    assert (checkpoint.spelling.name, checkpoint.prefix) == (spelling, prefix)
    for module, layer in checkpoint.layers.items():
        weight = effective_weight(layer.format, read_layer(checkpoint, module)).numpy()
        np.testing.assert_array_equal(weight, expected[layer.module])


def _flattened(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    patch = tensors.pop("patch_embedding.weight")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(patch.shape))
    writer.add_tensor("patch_embedding.weight", patch.astype(np.float16).reshape(-1, 64))


def _bf16(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    patch = torch.from_numpy(tensors.pop("patch_embedding.weight")).bfloat16()
    raw = patch.view(torch.uint8).numpy()
    writer.add_tensor("patch_embedding.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


@pytest.mark.parametrize(("change", "dtype"), [(_flattened, torch.float16), (_bf16, torch.bfloat16)])
def test_the_patch_embedding_keeps_its_five_dimensions(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter, Arrays], None], dtype: torch.dtype
) -> None:
    path, _, others = _write(tmp_path / "wan.gguf", change=change)
    read = read_plain(open_checkpoint(path), "patch_embedding.weight")
    assert tuple(read.shape) == (256, 16, 1, 2, 2)
    assert read.equal(torch.from_numpy(others["patch_embedding.weight"]).to(dtype))


def test_a_model_of_gguf_computes_what_its_weights_compute(tmp_path: Path) -> None:
    path, expected, others = _write(tmp_path / "wan.gguf", "q6_k", spelling="diffusers")
    from diffusers import WanTransformer3DModel

    stock: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=512, num_layers=1
    )
    weights = {**others, **{f"{module}.weight": weight for module, weight in expected.items()}}
    stock.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in weights.items()})
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
    }
    model = wan_runtime.load(path, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        ours, theirs = model(**inputs).sample, stock.eval()(**inputs).sample
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.std().item())


def test_it_converts(tmp_path: Path) -> None:
    path, expected, _ = _write(tmp_path / "wan.gguf", "q5_1")
    wan_runtime.convert(path, tmp_path / "new.safetensors", "bf16")
    new = load_file(tmp_path / "new.safetensors")
    for module, weight in expected.items():
        assert new[f"{module}.weight"].equal(torch.from_numpy(weight).bfloat16())


def test_floats_alone_are_a_plain_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    for key, tensor in state(SIZES).items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(tmp_path / "wan.gguf").dialect.name == "plain"


def _iq4(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    key = "text_embedding.2.weight"
    blocks = np.zeros((tensors.pop(key).shape[0], 136), dtype=np.uint8)
    writer.add_tensor(key, blocks, raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)


def _blocks_elsewhere(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    modulation = tensors.pop("head.modulation")
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("head.modulation", gguf.quants.quantize(modulation, q8_0), raw_dtype=q8_0)


def _other_count(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    writer.add_array("comfy.gguf.orig_shape.head.modulation", [1, 2, 255])


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (_iq4, "text_embedding.2.weight", r"it is IQ4_XS \[256, 256\], which is not read"),
        (_blocks_elsewhere, "head.modulation", r"it is Q8_0 \[1, 2, 256\], which is not read"),
        (_other_count, "head.modulation", r"its shape \[1, 2, 255\] is not that of its 512 stored values"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter, Arrays], None], key: str, words: str
) -> None:
    path, _, _ = _write(tmp_path / "wan.gguf", change=change)
    with pytest.raises(BadTensor, match=words) as caught:
        open_checkpoint(path)
    assert caught.value.key == key


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = _write(tmp_path / "wan.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'wan-runtime\[gguf\]'"):
        open_checkpoint(path)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    data = _write(tmp_path / "whole.gguf")[0].read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"cut short|stored|ends at byte"):
        read_header(cut)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path, _, _ = _write(tmp_path / "wan.gguf")
    path.write_bytes(path.read_bytes() + bytes(64))
    with pytest.raises(CheckpointError, match="its last tensor ends at byte"):
        read_header(path)


def test_a_tensor_that_is_not_where_the_alignment_puts_it_is_refused(tmp_path: Path) -> None:
    """A bit of an offset flipped: 16 bytes of padding follow a bias of 48 bytes, so nothing overlaps."""
    path, _, _ = _write(tmp_path / "wan.gguf", change=_short_bias)
    data = bytearray(path.read_bytes())
    name = b"blocks.0.norm3.bias"
    at = (
        data.index(name) + len(name) + 4 + 8 + 4
    )  # behind the number of dimensions, the dimension and the type
    offset = int.from_bytes(data[at : at + 8], "little")
    assert offset % 32 == 0
    data[at : at + 8] = (offset + 16).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(BadTensor, match=r"starts at byte \d+; what is before it ends at") as caught:
        read_header(path)
    assert caught.value.key == name.decode()


def _short_bias(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    writer.add_tensor("blocks.0.norm3.bias", tensors.pop("blocks.0.norm3.bias")[:12])


_KEY = struct.pack("<Q", 1) + b"k"
HOSTILE = {
    "no fields at all": b"",
    "more fields than bytes": struct.pack("<QQ", 0, 2**62),
    "more tensors than bytes": struct.pack("<QQ", 2**62, 0),
    "a string of 2^63 bytes": struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63),
    "an array of 2^61 strings": struct.pack("<QQ", 0, 1) + _KEY + struct.pack("<IIQ", 9, 8, 2**61),
    "an array of 2^61 bytes": struct.pack("<QQ", 0, 1) + _KEY + struct.pack("<IIQ", 9, 0, 2**61),
    "arrays in arrays": struct.pack("<QQ", 0, 1) + _KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
    "an unknown kind of field": struct.pack("<QQ", 0, 1) + _KEY + struct.pack("<I", 99),
    "a tensor of 2^63 values": struct.pack("<QQ", 1, 0) + _KEY + struct.pack("<IQIQ", 1, 2**63, 0, 0),
    "an unknown type": struct.pack("<QQ", 1, 0) + _KEY + struct.pack("<IQIQ", 1, 4, 999, 0),
    "a tensor far away": struct.pack("<QQ", 1, 0) + _KEY + struct.pack("<IQIQ", 1, 4, 0, 2**63),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("version", [b"\x03\0\0\0", b"\0\0\0\x03", b"\x01\0\0\0"])
def test_a_lie_in_the_header_is_an_error_of_ours(tmp_path: Path, case: str, version: bytes) -> None:
    path = tmp_path / "wan.gguf"
    path.write_bytes(b"GGUF" + version + HOSTILE[case])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
