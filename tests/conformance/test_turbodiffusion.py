"""TurboDiffusion's files, by what its own code does with them: its inference needs its CUDA kernels, so by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import wan_runtime
from tests.builders.files import turbodiffusion
from tests.builders.wan import Sizes, block_linears, state
from tests.reading import FIRST, content
from wan_runtime.checkpoint import open_checkpoint, read_layer, read_plain, stream
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.formats import FORMATS


def test_the_flattened_patch_embedding_is_the_same_convolution(tmp_path: Path) -> None:
    """Its Linear takes patches as "(c kt kh kw)": the product must be the one of the Conv3d that is read."""
    wanted = content("turbodiffusion", "int8_block")
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    weight = read_plain(checkpoint, "patch_embedding.weight")
    assert weight.shape == checkpoint.shape_of("patch_embedding.weight") == (128, 16, 1, 2, 2)
    video = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    convolved = torch.nn.functional.conv3d(video, weight, stride=(1, 2, 2))
    patches = video.reshape(1, 16, 3, 1, 2, 2, 3, 2).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
    linear = torch.nn.functional.linear(patches, wanted.tensors["patch_embedding.weight"])
    torch.testing.assert_close(convolved, linear.permute(0, 4, 1, 2, 3), rtol=1e-5, atol=1e-6)
    streamed = {item.path: item.slots for item in stream(checkpoint, torch.device("cpu"))}
    assert streamed["patch_embedding.weight"]["tensor"].equal(weight)


def test_each_block_has_its_scale_also_where_it_is_cut_short(tmp_path: Path) -> None:
    """dim 384 and ffn 200: two rows of blocks, the second of 72 weights, by three columns."""
    sizes = Sizes(dim=384, ffn=200)
    wanted = turbodiffusion(state(sizes), block_linears(sizes), "int8_block")
    key = "blocks.0.ffn.0"
    codes = torch.arange(200 * 384).remainder(255).sub(127).reshape(200, 384).to(torch.int8)
    codes[0, 0] = -128
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]) / 4096
    wanted.tensors |= {f"{key}.int8_weight": codes, f"{key}.scale": scales}
    checkpoint = open_checkpoint(wanted.write(tmp_path))
    weight = FORMATS["int8_block"].dequantize(read_layer(checkpoint, key))
    assert weight[0, 0] == -128 / 4096
    for row in (0, 127, 128, 199):
        for column in (0, 127, 128, 255, 256, 383):
            assert weight[row, column] == codes[row, column] * scales[row // 128, column // 128]


def test_a_file_trained_for_sparse_linear_attention_is_refused_by_name(tmp_path: Path) -> None:
    wanted = content("turbodiffusion", "int8_block")
    branch = "blocks.0.self_attn.attn_op.local_attn.proj_l"
    wanted.tensors |= {f"{branch}.weight": torch.zeros(128, 128), f"{branch}.bias": torch.zeros(128)}
    with pytest.raises(UnaccountedTensors, match=r"sparse-linear attention \(SLA\)") as caught:
        open_checkpoint(wanted.write(tmp_path))
    assert set(caught.value.unconsumed) == {f"{branch}.weight", f"{branch}.bias"}


@pytest.mark.parametrize("shape", [(1, 2), (2,), (256, 1), (4, 2)])
def test_scales_of_other_blocks_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """blocks.0.ffn.0 is [256, 128]: two blocks. Its producer knows no other size than 128."""
    wanted = content("turbodiffusion", "int8_block")
    wanted.tensors["blocks.0.ffn.0.scale"] = torch.ones(shape)
    with pytest.raises(BadTensor, match=r"F32 \[2, 1\]") as caught:
        open_checkpoint(wanted.write(tmp_path))
    assert caught.value.key == "blocks.0.ffn.0.scale"


def test_the_released_pickle_converts_and_does_nothing_else(tmp_path: Path) -> None:
    wanted = content("turbodiffusion", "int8_block")
    source = tmp_path / "TurboWan.pth"
    torch.save({key: tensor.clone() for key, tensor in wanted.tensors.items()}, source)
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(source)
    wan_runtime.convert(source, tmp_path / "bf16.safetensors", to="bf16", device="cpu")
    with safe_open(tmp_path / "bf16.safetensors", "pt") as file:
        assert file.get_tensor("patch_embedding.weight").shape == (128, 16, 1, 2, 2)
        truth = torch.from_numpy(wanted.weights[FIRST]).bfloat16()
        assert file.get_tensor(f"{FIRST}.weight").equal(truth)
