"""Modules that two spellings cut differently: split and joined, in every kind of slot, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import files
from tests.hosts.variants import State, built, kernels, linears, original
from wan_runtime.arranging import arranged
from wan_runtime.checkpoint import Checkpoint, open_checkpoint, read_layer, read_plain, stream
from wan_runtime.errors import BadTensor
from wan_runtime.formats import FORMATS
from wan_runtime.names import SPELLINGS

FUSED = "face_adapter.fuser_blocks.0.linear1_kv"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def animate() -> State:
    state: State = built("animate").state_dict()
    return state


def opened(content: files.Content, folder: Path) -> Checkpoint:
    return open_checkpoint(content.write(folder))


def weights(checkpoint: Checkpoint) -> State:
    """Every layer dequantised, and every plain tensor, as the stream yields them."""
    found: State = {}
    for item in stream(checkpoint, CPU):
        if item.format is None:
            found[item.path] = item.slots["tensor"]
        else:
            found[f"{item.path}.weight"] = FORMATS[item.format].dequantize(dict(item.slots))
    return found


def test_where_the_spellings_agree_nothing_changes(animate: State, tmp_path: Path) -> None:
    content = files.plain(original(animate), [], "none")
    checkpoint = opened(content, tmp_path)
    assert arranged(checkpoint, SPELLINGS["original"]) is checkpoint


@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_is_split_by_rows_and_a_scale_for_all_is_copied(
    animate: State, per_row: bool, tmp_path: Path
) -> None:
    tensors = original(animate)
    content = files.comfy_scaled_fp8(tensors, linears(tensors), "fp8", per_row=per_row)
    checkpoint = arranged(opened(content, tmp_path), SPELLINGS["diffusers"])
    meant = torch.from_numpy(content.weights[FUSED]).float()
    for path, rows in ((f"{FUSED[:-2]}k", meant[:128]), (f"{FUSED[:-2]}v", meant[128:])):
        slots = read_layer(checkpoint, path)
        assert slots["scale"].shape == ((128, 1) if per_row else (1, 1))
        assert torch.allclose(FORMATS["fp8"].dequantize(slots), rows, rtol=1e-6, atol=0)
        assert checkpoint.shape_of(f"{path}.weight") == (128, 128)


def test_tiled_block_scales_are_put_in_order_before_they_are_split(animate: State, tmp_path: Path) -> None:
    tensors = original(animate)
    content = files.comfy(tensors, linears(tensors), "nvfp4")
    checkpoint = arranged(opened(content, tmp_path), SPELLINGS["diffusers"])
    streamed = weights(checkpoint)
    meant = torch.from_numpy(content.weights[FUSED]).float()
    both = torch.cat([streamed[f"{FUSED[:-2]}{part}.weight"] for part in "kv"])
    assert torch.allclose(both, meant, rtol=1e-6, atol=1e-9)
    assert torch.equal(both, torch.cat([_read(checkpoint, part) for part in "kv"]))


def _read(checkpoint: Checkpoint, part: str) -> torch.Tensor:
    return FORMATS["nvfp4"].dequantize(read_layer(checkpoint, f"{FUSED[:-2]}{part}"))


def test_plain_tensors_are_split_reshaped_and_left_out(animate: State, tmp_path: Path) -> None:
    tensors = original(animate)
    checkpoint = opened(files.plain({**tensors, **kernels(tensors)}, [], "none"), tmp_path)
    checkpoint = arranged(checkpoint, SPELLINGS["diffusers"])
    streamed = weights(checkpoint)
    assert not any(key.endswith(".kernel") for key in streamed)
    assert torch.equal(streamed[f"{FUSED[:-2]}k.bias"], tensors[f"{FUSED}.bias"][:128])
    assert torch.equal(read_plain(checkpoint, f"{FUSED[:-2]}v.bias"), tensors[f"{FUSED}.bias"][128:])
    bias = "motion_encoder.enc.net_app.convs.2.conv1.1.bias"
    assert torch.equal(streamed[bias], tensors[bias].flatten())
    assert checkpoint.shape_of(bias) == streamed[bias].shape


def test_a_blur_that_diffusers_does_not_compute_is_refused(animate: State, tmp_path: Path) -> None:
    tensors = original(animate)
    blurs = kernels(tensors)
    first = next(iter(blurs))
    blurs[first] = torch.eye(4) / 4
    checkpoint = opened(files.plain({**tensors, **blurs}, [], "none"), tmp_path)
    with pytest.raises(BadTensor, match="not the blur kernel") as caught:
        arranged(checkpoint, SPELLINGS["diffusers"])
    assert caught.value.key == first


def test_halves_are_joined_for_a_host_of_the_original(animate: State, tmp_path: Path) -> None:
    save_file({k: t.contiguous() for k, t in animate.items()}, tmp_path / "model.safetensors")
    checkpoint = arranged(open_checkpoint(tmp_path), SPELLINGS["original"])
    streamed = weights(checkpoint)
    wanted = original(animate)
    assert streamed.keys() == wanted.keys()
    assert all(torch.equal(streamed[key], wanted[key]) for key in wanted)
    assert all(checkpoint.shape_of(key) == wanted[key].shape for key in wanted)
    assert all(torch.equal(read_plain(checkpoint, key), wanted[key]) for key in wanted)


def test_quantised_halves_keep_their_own_scales_when_joined(animate: State, tmp_path: Path) -> None:
    halves = [f"face_adapter.0.to_{part}" for part in "kv"]
    content = files.comfy_scaled_fp8(animate, halves, "fp8")
    checkpoint = arranged(opened(content, tmp_path), SPELLINGS["original"])
    slots = read_layer(checkpoint, FUSED)
    assert slots["scale"].shape == (256, 1)
    meant = torch.cat([torch.from_numpy(content.weights[path]).float() for path in halves])
    assert torch.allclose(FORMATS["fp8"].dequantize(slots), meant, rtol=1e-6, atol=0)
    assert torch.allclose(weights(checkpoint)[f"{FUSED}.weight"], meant, rtol=1e-6, atol=0)


def test_halves_that_one_module_cannot_hold_are_refused(animate: State, tmp_path: Path) -> None:
    content = files.comfy_scaled_fp8(animate, ["face_adapter.0.to_k"], "fp8")
    with pytest.raises(BadTensor, match="its other half"):
        arranged(opened(content, tmp_path / "one"), SPELLINGS["original"])
    halves = [f"face_adapter.0.to_{part}" for part in "kv"]
    checkpoint = arranged(
        opened(files.modelopt(animate, halves, "nvfp4"), tmp_path / "two"), SPELLINGS["original"]
    )
    with pytest.raises(BadTensor, match="one module has room for one"):  # two global scales
        read_layer(checkpoint, FUSED)
