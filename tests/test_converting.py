"""`convert`: what is written, tensor by tensor, against fp64 arithmetic and the tables of docs/formats.md."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wan_runtime
from tests.builders import files, wan
from tests.builders.codes import E2M1, E4M3, E8M0, Floats, tile_order
from tests.builders.writers import WRITERS
from wan_runtime.converting import targets
from wan_runtime.errors import BadTensor, CheckpointError, InvalidOption, NothingToPatch, UnknownName

Tensors = dict[str, torch.Tensor]
LAYERS = wan.block_linears()
LEAVES = {  # target -> leaf beside each quantised weight -> dtype
    "comfy-fp8-scaled": {"weight": "F8_E4M3", "scale_weight": "F32"},
    "comfy-fp8": {"weight": "F8_E4M3", "weight_scale": "F32", "comfy_quant": "U8"},
    "modelopt-fp8": {"weight": "F8_E4M3", "weight_scale": "F32"},
    "comfy-nvfp4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "comfy_quant": "U8"},
    "modelopt-nvfp4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
    "lightx2v-fp8": {"weight": "F8_E4M3", "weight_scale": "F32"},
    "lightx2v-nvfp4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"},
    "mxfp8": {"weight": "F8_E4M3", "weight_scale": "U8", "comfy_quant": "U8"},
}
NVFP4 = [target for target in LEAVES if "nvfp4" in target]
MX = [target for target in LEAVES if target == "mxfp8"]
FP8 = [target for target in LEAVES if "fp8" in target and target not in MX]
SWIZZLED = ("comfy-nvfp4", "lightx2v-nvfp4", "mxfp8")


@pytest.fixture(scope="module")
def state() -> Tensors:
    return wan.state()


@pytest.fixture
def plain(tmp_path: Path, state: Tensors) -> Path:
    return files.Content({key: tensor.bfloat16() for key, tensor in state.items()}).write(
        tmp_path, "plain.safetensors"
    )


def raw(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(*tensor.shape[:-1], -1)


def meant(tensors: Tensors, module: str, target: str) -> Floats:
    """The fp64 weight that a file of a target means, by docs/formats.md."""
    codes = raw(tensors[f"{module}.weight"])
    if target in FP8:
        name = "scale_weight" if target == "comfy-fp8-scaled" else "weight_scale"
        return np.asarray(E4M3[codes] * tensors[f"{module}.{name}"].double().numpy().reshape(-1, 1))
    if target in MX:
        values, block = E4M3[codes], 32
    else:
        high, low = E2M1[codes >> 4], E2M1[codes & 15]
        pairs = (high, low) if target.startswith("comfy") else (low, high)
        values, block = np.stack(pairs, axis=2).reshape(codes.shape[0], -1), 16
    out, groups = values.shape[0], values.shape[1] // block
    stored = raw(tensors[f"{module}.weight_scale"])
    if target in SWIZZLED:  # where each scale went, found by sending its number through the tile order
        places = np.arange(out * groups)
        halves = [tile_order((places >> bits & 255).astype(np.uint8).reshape(out, groups)) for bits in (0, 8)]
        mark = tile_order(np.ones((out, groups), dtype=np.uint8)).astype(bool)
        number = (halves[1].astype(int) * 256 + halves[0])[mark]
        plain = np.zeros(out * groups, dtype=np.uint8)
        plain[number] = stored[mark]
        stored = plain.reshape(out, groups)
    if target in MX:
        return np.asarray(values * np.repeat(E8M0[stored], block, axis=1))
    return np.asarray(values * np.repeat(E4M3[stored] * tensor_scale(tensors, module), block, axis=1))


def tensor_scale(tensors: Tensors, module: str) -> float:
    """The fp32 scale of an NVFP4 layer, by whichever keys the producer has for it."""
    if f"{module}.weight_scale_2" in tensors:
        return float(tensors[f"{module}.weight_scale_2"])
    if f"{module}.weight_global_scale" in tensors:
        return 1 / float(tensors[f"{module}.weight_global_scale"])
    return float(tensors[f"{module}.alpha"]) * float(tensors[f"{module}.input_global_scale"])


def relative(a: Floats, b: Floats) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def spelled(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, framework="pt") as file:
        return {key: (s.get_dtype(), s.get_shape()) for key in file.keys() if (s := file.get_slice(key))}  # noqa: SIM118


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def test_every_target_is_covered() -> None:
    assert set(targets()) == {*LEAVES, "bf16"}


@pytest.mark.parametrize("target", LEAVES)
def test_a_plain_file_is_quantised_as_the_producer_does(tmp_path: Path, plain: Path, target: str) -> None:
    report = wan_runtime.convert(plain, tmp_path / "new.safetensors", target)
    source, new = load_file(plain), load_file(tmp_path / "new.safetensors")
    written = spelled(tmp_path / "new.safetensors")
    bound = {**dict.fromkeys(NVFP4, 0.11), **dict.fromkeys(MX, 0.04)}.get(target, 0.03)
    for module in LAYERS:
        weight = source[f"{module}.weight"].double().numpy()
        beside = {
            k.removeprefix(f"{module}."): v[0] for k, v in written.items() if k.startswith(f"{module}.")
        }
        assert beside == {**LEAVES[target], "bias": "F32"}
        error = relative(meant(new, module, target), weight)
        assert 0.001 < error < bound
        assert report.errors[module] == pytest.approx(error, rel=1e-3)
        if target in NVFP4:
            assert tensor_scale(new, module) == pytest.approx(np.abs(weight).max() / 2688, rel=1e-6)
        elif target in FP8:
            scale = new[f"{module}.{next(leaf for leaf in LEAVES[target] if 'scale' in leaf)}"]
            amax = np.abs(weight).max(axis=1) if target == "lightx2v-fp8" else np.abs(weight).max()
            np.testing.assert_allclose(scale.double().numpy().squeeze(), amax / 448, rtol=1e-6)
    assert report.count("quantised") == len(LAYERS) == len(report.errors)


@pytest.mark.parametrize("target", FP8)
def test_fp8_codes_are_the_nearest_ones(tmp_path: Path, plain: Path, target: str) -> None:
    wan_runtime.convert(plain, tmp_path / "new.safetensors", target)
    source, new = load_file(plain), load_file(tmp_path / "new.safetensors")
    for module in LAYERS:
        weight = source[f"{module}.weight"].double().numpy()
        _, scale, _ = files.fp8(weight, "fp8", per_row=target == "lightx2v-fp8")
        step = np.abs(E4M3[raw(new[f"{module}.weight"])] - weight / scale)
        finite = np.sort(E4M3[np.isfinite(E4M3)])
        best = np.abs(finite[:, None] - (weight / scale).reshape(1, -1)).min(axis=0).reshape(weight.shape)
        assert np.all(step <= best * (1 + 1e-5) + 1e-12)


def test_scale_shapes_are_the_producers(tmp_path: Path, plain: Path) -> None:
    module = "blocks.0.ffn.0"
    shapes = {}
    for target in LEAVES:
        wan_runtime.convert(plain, tmp_path / "new.safetensors", target)
        written = spelled(tmp_path / "new.safetensors")
        shapes[target] = {
            leaf: written[f"{module}.{leaf}"][1] for leaf in LEAVES[target] if leaf != "comfy_quant"
        }
    assert shapes == {
        "comfy-fp8-scaled": {"weight": [256, 128], "scale_weight": [1]},
        "comfy-fp8": {"weight": [256, 128], "weight_scale": []},
        "modelopt-fp8": {"weight": [256, 128], "weight_scale": []},
        "comfy-nvfp4": {"weight": [256, 64], "weight_scale": [256, 8], "weight_scale_2": []},
        "modelopt-nvfp4": {"weight": [256, 64], "weight_scale": [256, 8], "weight_scale_2": []},
        "lightx2v-fp8": {"weight": [256, 128], "weight_scale": [256, 1]},
        "lightx2v-nvfp4": {"weight": [256, 64], "weight_scale": [256, 8], "weight_global_scale": []},
        **{target: {"weight": [256, 128], "weight_scale": [256, 4]} for target in MX},
    }


def test_the_scaled_fp8_marker_and_the_records_are_written(tmp_path: Path, plain: Path) -> None:
    wan_runtime.convert(plain, tmp_path / "a.safetensors", "comfy-fp8-scaled")
    assert spelled(tmp_path / "a.safetensors")["scaled_fp8"] == ("F8_E4M3", [2])
    wan_runtime.convert(plain, tmp_path / "b.safetensors", "comfy-nvfp4")
    record = load_file(tmp_path / "b.safetensors")["blocks.0.ffn.0.comfy_quant"]
    assert json.loads(bytes(record.tolist())) == {"format": "nvfp4"}


@pytest.mark.parametrize("target", LEAVES)
def test_what_is_written_is_never_undecidable(tmp_path: Path, plain: Path, target: str) -> None:
    dialect = targets()[target][0].name
    new = tmp_path / "new.safetensors"
    wan_runtime.convert(plain, new, target)
    mark = json.loads(metadata(new)["wan_runtime"])
    assert metadata(new)["format"] == "pt"
    assert (mark["dialect"], mark["source"], mark["version"]) == (
        dialect,
        "plain.safetensors",
        wan_runtime.__version__,
    )
    nibble = ("even high" if dialect == "comfy" else "even low") if target in NVFP4 else None
    blocks = ("swizzled" if target in SWIZZLED else "plain") if target in (*NVFP4, *MX) else None
    assert (mark.get("nibble"), mark.get("block scales")) == (nibble, blocks)
    assert wan_runtime.inspect(new).dialect == dialect


EXACT = [  # source dialect, format -> target: the same codes and scales, otherwise spelled
    ("comfy", "nvfp4", "modelopt-nvfp4"),
    ("comfy", "nvfp4", "comfy-nvfp4"),
    ("modelopt", "nvfp4", "comfy-nvfp4"),
    ("comfy_scaled_fp8", "fp8", "comfy-fp8"),
    ("comfy_scaled_fp8", "fp8", "modelopt-fp8"),
    ("comfy", "fp8", "comfy-fp8-scaled"),
    ("modelopt", "fp8", "comfy-fp8-scaled"),
    ("lightx2v", "nvfp4", "lightx2v-nvfp4"),
    ("lightx2v", "fp8", "lightx2v-fp8"),
]
WRITES = {
    "modelopt-nvfp4": "modelopt",
    "comfy-nvfp4": "comfy",
    "comfy-fp8": "comfy",
    "modelopt-fp8": "modelopt",
    "comfy-fp8-scaled": "comfy_scaled_fp8",
    "lightx2v-fp8": "lightx2v",
    "lightx2v-nvfp4": "lightx2v",
}


@pytest.mark.parametrize(("dialect", "held", "target"), EXACT)
@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_same_format_is_carried_over_bit_for_bit(
    tmp_path: Path, dialect: str, held: str, target: str, names: str, prefix: str
) -> None:
    """Expected: what a writer of the target's dialect makes of the same fp64 weights, under the other names."""
    content = files.WRITERS[dialect][0](wan.state(prefix=prefix), wan.block_linears(prefix=prefix), held)
    new = tmp_path / "new.safetensors"
    report = wan_runtime.convert(content.write(tmp_path / "in"), new, target, names)
    wanted = files.WRITERS[WRITES[target]][0](
        wan.state(spelling=names), wan.block_linears(spelling=names), held
    ).tensors
    written = load_file(new)
    assert written.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert written[key].dtype == tensor.dtype, key
        assert written[key].shape == tensor.shape, key
        assert torch.equal(
            written[key].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        ), key
    assert report.count("exact") == len(LAYERS)
    assert not report.errors


def test_there_and_back_gives_the_same_bytes(tmp_path: Path, plain: Path) -> None:
    first, there, back = (tmp_path / f"{name}.safetensors" for name in ("first", "there", "back"))
    for home, away in (("comfy-nvfp4", "modelopt-nvfp4"), ("comfy-fp8-scaled", "modelopt-fp8")):
        wan_runtime.convert(plain, first, home, "original")
        wan_runtime.convert(first, there, away, "diffusers")
        wan_runtime.convert(there, back, home, "original")
        before, after = load_file(first), load_file(back)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[k].reshape(-1).view(torch.uint8), after[k].reshape(-1).view(torch.uint8))
            for k in before
        )


def test_input_scales_are_carried_within_a_format_and_left_out_otherwise(
    tmp_path: Path, state: Tensors
) -> None:
    content = files.modelopt(state, LAYERS, "fp8")
    content.tensors |= {f"{module}.input_scale": torch.tensor(0.25) for module in LAYERS}
    source = content.write(tmp_path / "in")
    wan_runtime.convert(source, tmp_path / "same.safetensors", "comfy-fp8-scaled")
    same = load_file(tmp_path / "same.safetensors")
    assert all(float(same[f"{module}.scale_input"]) == 0.25 for module in LAYERS)
    report = wan_runtime.convert(source, tmp_path / "other.safetensors", "comfy-nvfp4")
    assert not any("input" in key for key in spelled(tmp_path / "other.safetensors"))
    assert any(f"{len(LAYERS)} static input scales were left out" in note for note in report.notes)


def test_another_format_is_requantised_and_its_error_reported(tmp_path: Path, state: Tensors) -> None:
    content = files.comfy_scaled_fp8(state, LAYERS, "fp8")
    report = wan_runtime.convert(
        content.write(tmp_path / "in"), tmp_path / "new.safetensors", "modelopt-nvfp4"
    )
    new = load_file(tmp_path / "new.safetensors")
    for module in LAYERS:
        error = relative(meant(new, module, "modelopt-nvfp4"), content.weights[module])
        assert report.errors[module] == pytest.approx(error, rel=1e-3)
        assert 0.05 < error < 0.11
    assert report.count("requantised") == len(LAYERS)
    assert any("second time" in note for note in report.notes)


def test_a_scale_an_output_channel_is_requantised_never_averaged(tmp_path: Path, state: Tensors) -> None:
    content = files.comfy_scaled_fp8(state, LAYERS, "fp8", per_row=True)
    content.tensors |= {f"{module}.scale_input": torch.tensor(0.5) for module in LAYERS}
    report = wan_runtime.convert(
        content.write(tmp_path / "in"), tmp_path / "new.safetensors", "comfy-fp8-scaled"
    )
    new = load_file(tmp_path / "new.safetensors")
    for module in LAYERS:
        assert new[f"{module}.scale_weight"].shape == (1,)
        assert float(new[f"{module}.scale_input"]) == 0.5
        assert relative(meant(new, module, "comfy-fp8-scaled"), content.weights[module]) < 0.03
    assert report.count("requantised") == len(LAYERS)


@pytest.mark.parametrize("held", ["fp8", "fp8_e5m2"])
def test_a_plain_cast_gets_scales(tmp_path: Path, state: Tensors, held: str) -> None:
    content = files.plain_fp8(state, LAYERS, held)
    wan_runtime.convert(content.write(tmp_path / "in"), tmp_path / "new.safetensors", "comfy-fp8-scaled")
    new = load_file(tmp_path / "new.safetensors")
    for module in LAYERS:
        error = relative(meant(new, module, "comfy-fp8-scaled"), content.weights[module])
        assert error == 0 if held == "fp8" else error < 0.03


@pytest.mark.parametrize(("dialect", "held"), [(d, f) for d, (_, fs) in WRITERS.items() for f in fs])
def test_to_bf16_is_the_dequantised_weight_rounded_once(
    tmp_path: Path, state: Tensors, dialect: str, held: str
) -> None:
    content = WRITERS[dialect][0](state, LAYERS, held)
    wan_runtime.convert(content.write(tmp_path / "in"), tmp_path / "new.safetensors", "bf16")
    new = load_file(tmp_path / "new.safetensors")
    assert new.keys() == state.keys()
    for key, tensor in state.items():
        module = key.removesuffix(".weight")
        if module in LAYERS:
            weight = content.weights.get(module, tensor.double().numpy())
            assert new[key].dtype == torch.bfloat16
            # One fp32 rounding a product before the bf16 one: the nearest bf16, or its neighbour at a tie.
            assert np.all(np.abs(new[key].double().numpy() - weight) <= np.abs(weight) * 2.0**-8 * (1 + 1e-5))
        else:
            assert new[key].dtype == torch.float32
            assert torch.equal(new[key], tensor)


def test_what_is_kept_is_kept_as_it_was_and_residents_are_fp32(tmp_path: Path, state: Tensors) -> None:
    half = {key: tensor.half() for key, tensor in state.items()}
    source = files.Content(dict(half)).write(tmp_path / "in")
    wan_runtime.convert(source, tmp_path / "new.safetensors", "comfy-fp8-scaled")
    new = load_file(tmp_path / "new.safetensors")
    for key, tensor in half.items():
        if key.removesuffix(".weight") in LAYERS:
            continue
        fp32 = tensor.dim() < 2 or key.endswith("modulation")
        assert new[key].dtype == (torch.float32 if fp32 else torch.float16), key
        assert torch.equal(new[key].double(), tensor.double()), key


def test_quantised_embeddings_come_back_in_fp32_rather_than_in_four_bits(
    tmp_path: Path, state: Tensors
) -> None:
    content = files.comfy_scaled_fp8(state, [*LAYERS, "head.head"], "fp8")
    wan_runtime.convert(content.write(tmp_path / "in"), tmp_path / "new.safetensors", "comfy-nvfp4")
    head = load_file(tmp_path / "new.safetensors")["head.head.weight"]
    assert head.dtype == torch.float32
    assert relative(head.double().numpy(), content.weights["head.head"]) < 1e-7


def test_a_producers_choice_of_layers_is_kept(tmp_path: Path, state: Tensors) -> None:
    chosen = [module for module in LAYERS if "blocks.1." in module]
    content = files.modelopt(state, chosen, "nvfp4")
    report = wan_runtime.convert(content.write(tmp_path / "in"), tmp_path / "new.safetensors", "comfy-fp8")
    new = load_file(tmp_path / "new.safetensors")
    assert report.count("requantised") == len(chosen)
    assert torch.equal(new["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"])


def test_keep_leaves_layers_unquantised_under_either_spelling(tmp_path: Path, plain: Path) -> None:
    for pattern in ("blocks.0.*", "blocks.*.ffn.net.2"):
        report = wan_runtime.convert(plain, tmp_path / "new.safetensors", "comfy-fp8", keep=(pattern,))
        kept = [m for m in LAYERS if (m.startswith("blocks.0.") if "0" in pattern else m.endswith("ffn.2"))]
        new = spelled(tmp_path / "new.safetensors")
        assert {m for m in LAYERS if new[f"{m}.weight"][0] == "BF16"} == set(kept)
        assert report.count("quantised") == len(LAYERS) - len(kept)


def test_wrong_requests_are_refused_by_name(tmp_path: Path, plain: Path) -> None:
    new = tmp_path / "new.safetensors"
    with pytest.raises(UnknownName, match="comfy-fp8-scaled"):
        wan_runtime.convert(plain, new, "fp4")
    with pytest.raises(UnknownName, match=r"keep, .*diffusers, .*original"):
        wan_runtime.convert(plain, new, "bf16", "kohya")
    with pytest.raises(InvalidOption, match="matches no module"):
        wan_runtime.convert(plain, new, "comfy-fp8", keep=("block.0.*",))
    with pytest.raises(NothingToPatch, match="no layer would be held in fp8"):
        wan_runtime.convert(plain, new, "comfy-fp8", keep=("*",))
    with pytest.raises(InvalidOption, match=r"must end in \.safetensors"):
        wan_runtime.convert(plain, tmp_path / "new.bin", "bf16")
    with pytest.raises(InvalidOption, match="no folder"):
        wan_runtime.convert(plain, tmp_path / "none" / "new.safetensors", "bf16")
    with pytest.raises(CheckpointError, match="no such file"):
        wan_runtime.convert(tmp_path / "none.safetensors", new, "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.safetensors"]


@pytest.mark.parametrize("alias", ["same", "symlink", "hardlink"])
def test_a_file_is_not_converted_onto_itself(tmp_path: Path, plain: Path, alias: str) -> None:
    before = plain.read_bytes()
    new = plain if alias == "same" else tmp_path / "alias.safetensors"
    if alias == "symlink":
        new.symlink_to(plain)
    elif alias == "hardlink":
        new.hardlink_to(plain)
    with pytest.raises(InvalidOption, match="being read"):
        wan_runtime.convert(plain, new, "bf16")
    assert plain.read_bytes() == before


def test_a_bad_tensor_leaves_the_older_file_as_it_was(tmp_path: Path, state: Tensors) -> None:
    """The damage is in the tensor that is read last, when nearly everything has been written."""
    content = files.Content({key: tensor.bfloat16() for key, tensor in state.items()})
    last = max(content.tensors)
    content.tensors[last] = torch.full_like(content.tensors[last], float("nan"))
    source, new = content.write(tmp_path / "in"), tmp_path / "new.safetensors"
    new.write_bytes(b"what was there before")
    with pytest.raises(BadTensor, match="NaN"):
        wan_runtime.convert(source, new, "comfy-nvfp4")
    assert new.read_bytes() == b"what was there before"
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"takes .* GiB and .* free"):
        wan_runtime.convert(plain, tmp_path / "new.safetensors", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.safetensors"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bf16 file of about 200 MB in layers of at most 4 MB."""
    sizes = wan.Sizes(dim=1024, ffn=2048, layers=8)
    tensors = {key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, _, shape in wan.rows(sizes)}
    folder = tmp_path_factory.mktemp("large")
    save_file(tensors, folder / "large.safetensors")
    yield folder / "large.safetensors"
    shutil.rmtree(folder)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_conversion_leaves_the_older_file_as_it_was(
    tmp_path: Path, large: Path, root: Path, stop: signal.Signals
) -> None:
    new = tmp_path / "new.safetensors"
    new.write_bytes(b"what was there before")
    command = [
        sys.executable,
        "-m",
        "wan_runtime.cli",
        "convert",
        str(large),
        str(new),
        "--to",
        "comfy-nvfp4",
    ]
    # A shell's background job ignores SIGINT, and so would what it starts, this test and its command included.
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until = time.monotonic() + 120
    while not left_behind(tmp_path) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(stop)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0, said
    assert "Traceback" not in said
    assert new.read_bytes() == b"what was there before"
    if stop == signal.SIGKILL:  # nobody can tidy up after that one but the next to write the same file
        assert len(left_behind(tmp_path)) == 1
        wan_runtime.convert(files.Content(wan.state()).write(tmp_path / "in"), new, "comfy-nvfp4")
        assert wan_runtime.inspect(new).dialect == "comfy"
    assert left_behind(tmp_path) == []


MEASURE = """
import sys
import torch, wan_runtime
torch.set_num_threads(1)

def peak():  # of this process alone; getrusage's begins with the parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large, folder, target = sys.argv[1:]
wan_runtime.convert(small, folder + "/small.safetensors", target)
before = peak()
wan_runtime.convert(large, folder + "/large.safetensors", target)
print(peak() - before, peak())
"""


@pytest.mark.parametrize("target", ["comfy-fp8-scaled", "comfy-nvfp4"])
def test_memory_is_bounded_by_a_layer_not_by_the_file(
    tmp_path: Path, plain: Path, large: Path, root: Path, target: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(plain), str(large), str(tmp_path), target],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    grown, peak = map(int, done.stdout.split())
    size, largest = large.stat().st_size, 2 * 1024 * 6 * 1024  # the time projection, bf16
    assert size > 150e6
    assert grown < size / 2, f"converting {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB more memory"
    assert peak < 1.5 * largest + 2**30


def test_every_target_is_the_same_file_whatever_the_threads(tmp_path: Path, plain: Path) -> None:
    for target in targets():
        written = set()
        for threads in (1, 2, 5):
            new = tmp_path / "new.safetensors"
            wan_runtime.convert(plain, new, target, threads=threads)
            written.add(new.read_bytes())
        assert len(written) == 1, target
    with pytest.raises(InvalidOption, match="threads=0"):
        wan_runtime.convert(plain, tmp_path / "new.safetensors", "bf16", threads=0)


@pytest.mark.parametrize("target", ["comfy-fp8", "comfy-nvfp4", "lightx2v-fp8"])
def test_searched_scales_are_the_same_file_whatever_the_threads_and_nowhere_worse(
    tmp_path: Path, plain: Path, target: str
) -> None:
    source, reports, written = load_file(plain), [], []
    for scale, threads in (("amax", 1), ("mse", 1), ("mse", 3)):
        new = tmp_path / f"{scale}{threads}.safetensors"
        reports.append(wan_runtime.convert(plain, new, target, scale=scale, threads=threads))
        written.append(new)
    assert written[1].read_bytes() == written[2].read_bytes()
    amax, searched = load_file(written[0]), load_file(written[1])
    for module in LAYERS:
        weight = source[f"{module}.weight"].double().numpy()
        before, after = (relative(meant(f, module, target), weight) for f in (amax, searched))
        assert after <= before * (1 + 1e-6)
        assert reports[1].errors[module] == pytest.approx(after, rel=1e-3)
    assert sum(reports[1].errors.values()) < 0.999 * sum(reports[0].errors.values())


def test_a_search_that_would_do_nothing_is_refused(tmp_path: Path, state: Tensors, plain: Path) -> None:
    new = tmp_path / "new.safetensors"
    source = files.comfy(state, LAYERS, "fp8").write(tmp_path / "in")
    with pytest.raises(InvalidOption, match="carried over as they are"):
        wan_runtime.convert(source, new, "modelopt-fp8", scale="mse")
    with pytest.raises(InvalidOption, match="bf16 has none to search"):
        wan_runtime.convert(source, new, "bf16", scale="mse")
    with pytest.raises(UnknownName, match="amax, mse"):
        wan_runtime.convert(plain, new, "comfy-fp8", scale="best")
    assert not new.exists()


def test_a_scale_an_output_channel_where_the_target_can_hold_one(tmp_path: Path, plain: Path) -> None:
    new = tmp_path / "new.safetensors"
    report = wan_runtime.convert(plain, new, "comfy-fp8-scaled", per_channel=True)
    source, written = load_file(plain), load_file(new)
    for module in LAYERS:
        weight = source[f"{module}.weight"].double().numpy()
        scale = written[f"{module}.scale_weight"]
        assert scale.shape == (weight.shape[0], 1)
        np.testing.assert_allclose(scale.double().numpy()[:, 0], np.abs(weight).max(axis=1) / 448, rtol=1e-6)
        assert report.errors[module] == pytest.approx(
            relative(meant(written, module, "comfy-fp8-scaled"), weight), rel=1e-3
        )
    for target in ("modelopt-fp8", "comfy-nvfp4", "bf16"):
        with pytest.raises(InvalidOption, match="is for comfy-fp8-scaled, lightx2v-fp8"):
            wan_runtime.convert(plain, new, target, per_channel=True)


def test_one_scale_a_tensor_becomes_the_same_scale_for_every_channel(tmp_path: Path, state: Tensors) -> None:
    content = files.comfy_scaled_fp8(state, LAYERS, "fp8")
    new, back = tmp_path / "new.safetensors", tmp_path / "back.safetensors"
    report = wan_runtime.convert(content.write(tmp_path / "in"), new, "lightx2v-fp8")
    written = load_file(new)
    for module in LAYERS:
        assert written[f"{module}.weight_scale"].shape == (state[f"{module}.weight"].shape[0], 1)
        assert torch.equal(raw_tensor(written, module), raw_tensor(content.tensors, module))
        assert np.array_equal(meant(written, module, "lightx2v-fp8"), content.weights[module])
    assert (report.count("exact"), report.errors) == (len(LAYERS), {})
    kept = wan_runtime.convert(new, back, "comfy-fp8-scaled", per_channel=True)
    assert kept.count("exact") == len(LAYERS)
    assert all(
        np.array_equal(meant(load_file(back), m, "comfy-fp8-scaled"), content.weights[m]) for m in LAYERS
    )


def raw_tensor(tensors: Tensors, module: str) -> torch.Tensor:
    return tensors[f"{module}.weight"].view(torch.uint8)


NVFP4_TRIPS = [
    ("comfy-nvfp4", "lightx2v-nvfp4"),
    ("comfy-nvfp4", "modelopt-nvfp4"),
    ("lightx2v-nvfp4", "modelopt-nvfp4"),
]


@pytest.mark.parametrize(("home", "away"), NVFP4_TRIPS)
def test_nvfp4_there_and_back_is_the_same_to_the_bit(
    tmp_path: Path, plain: Path, home: str, away: str
) -> None:
    """With input scales, as released files have them; the stored form of a scale without one is a reciprocal."""
    first, there, back = (tmp_path / f"{name}.safetensors" for name in ("first", "there", "back"))
    activations = {module: 0.7 + number for number, module in enumerate(LAYERS)}
    wan_runtime.convert(plain, first, home, "original", activations=activations)
    assert wan_runtime.convert(first, there, away, "diffusers").count("exact") == len(LAYERS)
    assert wan_runtime.convert(there, back, home, "original").count("exact") == len(LAYERS)
    before, after = load_file(first), load_file(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if home == "lightx2v-nvfp4" and key.endswith((".alpha", ".input_global_scale")):
            continue  # two factors of one number
        if key.endswith(".input_scale"):  # LightX2V stores its reciprocal, and no weight depends on it
            assert float(after[key]) == pytest.approx(float(tensor), rel=2**-22)
            continue
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[key].reshape(-1).view(torch.uint8)), (
            key
        )
    for module in LAYERS:
        assert tensor_scale(before, module) == pytest.approx(tensor_scale(after, module), rel=1e-7)


def test_lightx2v_without_input_scales_moves_a_scale_by_the_last_bit_at_most(
    tmp_path: Path, plain: Path
) -> None:
    first, there, back = (tmp_path / f"{name}.safetensors" for name in ("first", "there", "back"))
    wan_runtime.convert(plain, first, "comfy-nvfp4")
    wan_runtime.convert(first, there, "lightx2v-nvfp4")
    wan_runtime.convert(there, back, "comfy-nvfp4")
    before, after = load_file(first), load_file(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith("weight_scale_2"):
            assert abs(float(after[key]) / float(tensor) - 1) <= 2**-23
        else:
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[key].reshape(-1).view(torch.uint8))


def test_lightx2vs_mxfp8_becomes_comfys_to_the_bit(tmp_path: Path, state: Tensors) -> None:
    content = files.lightx2v(state, LAYERS, "mxfp8")
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    report = wan_runtime.convert(content.write(tmp_path / "in"), first, "mxfp8")
    written = load_file(first)
    for module in LAYERS:
        assert torch.equal(raw_tensor(written, module), raw_tensor(content.tensors, module))
        assert np.array_equal(meant(written, module, "mxfp8"), content.weights[module])
    assert (report.count("exact"), report.errors) == (len(LAYERS), {})
    wan_runtime.convert(first, again, "mxfp8")
    for key, tensor in load_file(again).items():
        assert torch.equal(
            tensor.reshape(-1).view(torch.uint8), written[key].reshape(-1).view(torch.uint8)
        ), key


def test_a_source_that_is_the_target_already_is_said_to_be(tmp_path: Path, plain: Path) -> None:
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    report = wan_runtime.convert(plain, first, "comfy-nvfp4")
    assert not any("already" in note for note in report.notes)
    report = wan_runtime.convert(first, again, "comfy-nvfp4", "diffusers")
    assert any("is comfy-nvfp4 already" in note for note in report.notes)
    other = wan_runtime.convert(first, again, "modelopt-nvfp4")
    assert not any("already" in note for note in other.notes)


REST = {  # rest_dtype -> dtypes of a norm, a bias, the modulation, the text embedding and a kept block Linear
    "auto": ("F32", "F32", "F32", "F16", "F16"),
    "keep": ("F16", "F16", "F16", "F16", "F16"),
    "fp32": ("F32", "F32", "F32", "F32", "F32"),
    "bf16": ("BF16", "BF16", "BF16", "BF16", "BF16"),
    "fp16": ("F16", "F16", "F16", "F16", "F16"),
}


@pytest.mark.parametrize("rest", REST)
def test_the_dtype_of_what_is_not_quantised_can_be_asked_for(
    tmp_path: Path, state: Tensors, rest: str
) -> None:
    source = files.Content({key: tensor.half() for key, tensor in state.items()}).write(tmp_path / "in")
    keys = (
        "blocks.0.self_attn.norm_q.weight", "blocks.1.ffn.0.bias", "blocks.0.modulation",
        "text_embedding.0.weight", "blocks.0.ffn.0.weight",
    )  # fmt: skip
    new = tmp_path / "new.safetensors"
    wan_runtime.convert(source, new, "comfy-fp8", keep="blocks.0.ffn.0", rest_dtype=rest)
    written = spelled(new)
    assert tuple(written[key][0] for key in keys) == REST[rest]
    assert written["blocks.1.ffn.0.weight"][0] == "F8_E4M3"
    wan_runtime.convert(source, new, "bf16", rest_dtype=rest)
    written = spelled(new)
    wanted = ("F32",) * 4 if rest == "auto" else REST[rest][:4]
    assert tuple(written[key][0] for key in keys) == (*wanted, "BF16")
    with pytest.raises(UnknownName, match="auto, keep, fp32, bf16, fp16"):
        wan_runtime.convert(source, new, "bf16", rest_dtype="fp8")


def test_a_value_beyond_fp16_is_refused_rather_than_made_infinite(tmp_path: Path, state: Tensors) -> None:
    tensors = dict(state)
    tensors["blocks.1.ffn.2.bias"] = torch.full_like(tensors["blocks.1.ffn.2.bias"], 1e6)
    source = files.Content(tensors).write(tmp_path / "in")
    with pytest.raises(BadTensor, match=r"blocks\.1\.ffn\.2\.bias.*beyond fp16"):
        wan_runtime.convert(source, tmp_path / "new.safetensors", "comfy-fp8", rest_dtype="fp16")
    assert not (tmp_path / "new.safetensors").exists()


STATIC = {  # target -> leaf of the static input scale, and what its value times the amax is
    "comfy-fp8-scaled": ("scale_input", 1 / 448, 1),
    "comfy-fp8": ("input_scale", 1 / 448, 1),
    "comfy-nvfp4": ("input_scale", 1 / 2688, 1),
    "modelopt-fp8": ("input_scale", 1 / 448, 1),
    "modelopt-nvfp4": ("input_scale", 1 / 2688, 1),
    "lightx2v-fp8": ("input_scale", 1 / 448, 1),
    "lightx2v-nvfp4": ("input_global_scale", 2688, -1),
}


@pytest.mark.parametrize("target", STATIC)
def test_recorded_activations_become_input_scales_in_the_producers_spelling(
    tmp_path: Path, plain: Path, target: str
) -> None:
    leaf, factor, power = STATIC[target]
    activations = {module: 3.0 + number for number, module in enumerate(LAYERS)}
    new, calls = tmp_path / "new.safetensors", []

    def record() -> dict[str, float]:
        calls.append(1)
        return activations

    wan_runtime.convert(plain, new, target, activations=record)
    written = load_file(new)
    for module, amax in activations.items():
        assert written[f"{module}.{leaf}"].shape == ()
        assert float(written[f"{module}.{leaf}"]) == pytest.approx(factor * amax**power, rel=1e-6)
    assert calls == [1]
    read = wan_runtime.load(new, host="diffusers", device="cpu", activation="static")
    scales = [p for name, p in read.named_parameters() if name.endswith("input_scale")]
    assert len(scales) == len(LAYERS)
    over = wan_runtime.convert(
        new, tmp_path / "over.safetensors", target, activations=dict.fromkeys(LAYERS, 9)
    )
    assert over.count("exact") == len(LAYERS)
    again = load_file(tmp_path / "over.safetensors")
    assert all(float(again[f"{m}.{leaf}"]) == pytest.approx(factor * 9**power, rel=1e-6) for m in LAYERS)


def test_a_calibration_is_not_run_for_what_cannot_be_written(tmp_path: Path, plain: Path) -> None:
    def never() -> dict[str, float]:
        raise AssertionError("the calibration ran")

    for options, said in (
        ({"to": "bf16"}, "no place for calibrated input scales"),
        ({"to": "lightx2v-fp8", "keep": "nothing.*"}, "matches no module"),
        ({"to": "comfy-fp8", "keep": "nothing.*"}, "matches no module"),
    ):
        with pytest.raises(InvalidOption, match=said):
            wan_runtime.convert(plain, tmp_path / "new.safetensors", **options, activations=never)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="being read"):
        wan_runtime.convert(plain, plain, "comfy-fp8", activations=never)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0, None])
def test_a_calibration_that_leaves_a_layer_out_is_refused(
    tmp_path: Path, plain: Path, value: float | None
) -> None:
    activations = dict.fromkeys(LAYERS, 1.0)
    if value is None:
        del activations["blocks.1.ffn.0"]
    else:
        activations["blocks.1.ffn.0"] = value
    with pytest.raises(InvalidOption, match=r"no amax for 1 of 20 layers, the first 'blocks\.1\.ffn\.0'"):
        wan_runtime.convert(plain, tmp_path / "new.safetensors", "comfy-fp8", activations=activations)
    keep = "blocks.1.ffn.0"
    wan_runtime.convert(plain, tmp_path / "new.safetensors", "comfy-fp8", keep=keep, activations=activations)
