"""Wan-Animate-2 through diffusers' own class and converter: names, and one pass over a reference video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanAnimate2Transformer3DModel
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from safetensors.torch import load_file

import wan_runtime
from tests.builders import files
from tests.hosts.diffusers import error
from tests.hosts.variants import State, linears
from wan_runtime.errors import CheckpointError, InvalidOption
from wan_runtime.linear import QuantLinear
from wan_runtime.names import SPELLINGS, from_original, naming_of, to_original

RELEASE, DIFFUSERS = SPELLINGS["animate_2"], SPELLINGS["diffusers_animate_2"]
CONFIG = {
    "in_dim": 36,
    "dim": 128,
    "ffn_dim": 256,
    "freq_dim": 32,
    "text_dim": 32,
    "num_heads": 1,
    "num_layers": 2,
}


def built(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = WanAnimate2Transformer3DModel(**CONFIG).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.copy_(
                    (1.0 if ".norm" in path and "weight" in path else 0.0) + 0.1 * torch.randn_like(parameter)
                )
    return model


def release(state: State) -> State:
    return {from_original(RELEASE, to_original(DIFFUSERS, key)): tensor for key, tensor in state.items()}


def run(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        result: torch.Tensor = model(
            hidden_states=[torch.randn(16, 2, 4, 4, generator=make).to(dtype)],
            timestep=torch.tensor([1.0]),
            encoder_hidden_states=[torch.randn(9, 32, generator=make).to(dtype)],
            condition_latents=[torch.randn(20, 2, 4, 4, generator=make).to(dtype)],
            kv_cache=WanAnimate2KVCache(2),
            kv_cache_mode="extract",
            seq_len=8,
            encoder_hidden_states_image=torch.randn(1, 5, 1280, generator=make).to(dtype),
            offset_grid_sizes=torch.tensor([[2, 2, 2]]),
            return_dict=False,
        )[0][0]
    return result


def test_diffusers_own_converter_agrees() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_animate_2_transformer_to_diffusers

    state = built().state_dict()
    original = release(state)
    assert "blocks.1.block.self_attn.q.weight" in original and "head.modulation" in original
    assert convert_wan_animate_2_transformer_to_diffusers(dict(original)).keys() == state.keys()


def test_each_spelling_is_told_from_the_others() -> None:
    state = built().state_dict()
    assert naming_of(Path("file"), release(state))[0] is RELEASE
    assert naming_of(Path("file"), state)[0] is DIFFUSERS


@pytest.mark.parametrize("spelling", ["animate_2", "diffusers_animate_2"])
def test_an_fp8_file_computes_what_diffusers_does_with_its_weights(spelling: str, tmp_path: Path) -> None:
    state = built().state_dict()
    tensors = release(state) if spelling == "animate_2" else dict(state)
    content = files.comfy_scaled_fp8(tensors, linears(tensors), "fp8")
    truth = built(seed=5)
    meant = {path: torch.from_numpy(w).float() for path, w in content.weights.items()}
    names = SPELLINGS[spelling]
    renamed = {from_original(DIFFUSERS, to_original(names, f"{path}.weight")): w for path, w in meant.items()}
    truth.load_state_dict({**state, **renamed})
    path = content.write(tmp_path)
    assert wan_runtime.inspect(path).variant.startswith("unlisted WAN Animate-2")
    model = wan_runtime.load(
        path, host="diffusers_animate_2", device="cpu", dtype=torch.float32, compute="fp32", backend="reference"
    )  # fmt: skip
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(content.weights) == 24
    assert error(run(model), run(truth)) < 1e-4
    model = built(seed=6)
    wan_runtime.patch(model, path)
    assert error(run(model, torch.bfloat16), run(truth)) < 0.05


def test_the_other_class_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = files.plain(release(built().state_dict()), [], "none").write(tmp_path)
    with pytest.raises(InvalidOption, match="host='diffusers_animate_2'"):
        wan_runtime.load(path, device="cpu")
    from tests.hosts.diffusers import checkpoint

    with pytest.raises(InvalidOption, match="Use host='diffusers'"):
        wan_runtime.load(checkpoint(tmp_path / "t2v.safetensors"), host="diffusers_animate_2", device="cpu")


def test_an_image_to_video_model_of_the_same_shapes_does_not_take_it(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    path = files.plain(release(built().state_dict()), [], "none").write(tmp_path)
    i2v = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=36, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=256, num_layers=2, image_dim=1280, added_kv_proj_dim=128,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="has the shapes of an I2V model and computes otherwise"):
        wan_runtime.patch(i2v, path)
    with pytest.raises(CheckpointError, match="'original' names would lose that"):
        wan_runtime.convert(path, tmp_path / "out.safetensors", to="bf16", names="original")
    wan_runtime.convert(path, tmp_path / "out.safetensors", to="bf16", names="diffusers_animate_2")
    assert naming_of(Path("out"), load_file(tmp_path / "out.safetensors"))[0] is DIFFUSERS
