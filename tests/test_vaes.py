"""The VAE as a single file. The judge of the names is diffusers' own single-file converter, which knows Wan2.1's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from wan_runtime import vaes
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.names import to_original
from wan_runtime.vaes import WAN22, latent_channels, load_vae, names_of

SMALL: dict[str, Any] = {"base_dim": 4, "latents_mean": [0.1] * 16, "latents_std": [2.0] * 16}
RESIDUAL: dict[str, Any] = {**WAN22, "base_dim": 4, "decoder_base_dim": 8}
CPU = torch.device("cpu")


def vae(config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoencoderKLWan(**config).eval()


def write(model: Any, path: Path, *, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
    """The model's weights under the original release's names."""
    names = names_of(model.config)
    tensors = {
        prefix + to_original(names, k): t.to(dtype).contiguous() for k, t in model.state_dict().items()
    }
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def small() -> Any:
    return vae(SMALL)


def test_diffusers_own_converter_agrees(small: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    state = small.state_dict()
    theirs = convert_wan_vae_to_diffusers(
        {to_original(names_of(small.config), k): t for k, t in state.items()}
    )
    assert theirs.keys() == state.keys()
    assert all(theirs[key] is state[key] for key in state)


@pytest.mark.parametrize(
    ("original", "ours"),
    [  # by hand from wan/modules/vae2_2.py: lists of [residual blocks, resampling] in each stage
        (
            "encoder.downsamples.0.downsamples.1.residual.6.weight",
            "encoder.down_blocks.0.resnets.1.conv2.weight",
        ),
        (
            "encoder.downsamples.1.downsamples.2.time_conv.bias",
            "encoder.down_blocks.1.downsampler.time_conv.bias",
        ),
        (
            "decoder.upsamples.0.upsamples.3.resample.1.weight",
            "decoder.up_blocks.0.upsampler.resample.1.weight",
        ),
        ("decoder.upsamples.2.upsamples.0.shortcut.bias", "decoder.up_blocks.2.resnets.0.conv_shortcut.bias"),
        ("decoder.upsamples.3.upsamples.2.residual.0.gamma", "decoder.up_blocks.3.resnets.2.norm1.gamma"),
        ("decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
        ("conv1.weight", "quant_conv.weight"),
        ("encoder.conv1.weight", "encoder.conv_in.weight"),
    ],
)
def test_wan22_names_are_those_of_its_release(original: str, ours: str) -> None:
    model = vae(RESIDUAL)
    assert ours in model.state_dict()
    assert to_original(names_of(model.config), ours) == original


@pytest.mark.parametrize("config", [SMALL, RESIDUAL], ids=["2.1", "2.2"])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_file_of_the_bases_sizes_takes_the_bases_configuration(
    config: dict[str, Any], prefix: str, tmp_path: Path
) -> None:
    model = vae(config)
    file = write(model, tmp_path / "vae.safetensors", prefix=prefix)
    assert latent_channels(file) == model.config.z_dim
    loaded = load_vae(file, CPU, model.config)
    assert loaded.config.latents_mean == model.config.latents_mean
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert loaded.dtype == torch.float32 and not loaded.training


def test_it_decodes_as_the_same_vae_from_a_folder(small: Any, tmp_path: Path) -> None:
    file = write(small, tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    loaded = load_vae(file, CPU, small.config)
    small.save_pretrained(tmp_path / "folder")
    folder = AutoencoderKLWan.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16).float()
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents).sample, folder.decode(latents).sample)


def test_diffusers_names_are_read_too(small: Any, tmp_path: Path) -> None:
    save_file({k: t.contiguous() for k, t in small.state_dict().items()}, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors", CPU, small.config)
    assert torch.equal(loaded.decoder.conv_in.weight, small.decoder.conv_in.weight)


def test_a_published_vae_brings_its_own_configuration(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Wan2.2 VAE given beside a Wan2.1 base: whether it fits the transformer is the pipeline's question."""
    monkeypatch.setattr(
        vaes, "PUBLISHED", (SMALL, RESIDUAL)
    )  # the real ones have 0.1 and 0.7 thousand million weights
    file = write(vae(RESIDUAL), tmp_path / "wan2.2_vae.safetensors")
    loaded = load_vae(file, CPU, small.config)
    assert (loaded.config.z_dim, loaded.config.scale_factor_spatial) == (48, 16)
    assert loaded.config.latents_mean == WAN22["latents_mean"]
    assert len(WAN22["latents_mean"]) == len(WAN22["latents_std"]) == 48


def test_a_vae_of_no_known_size_is_refused(small: Any, tmp_path: Path) -> None:
    file = write(small, tmp_path / "vae.safetensors")
    with pytest.raises(UnaccountedTensors, match="of no size that is known"):
        load_vae(file, CPU)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("blocks.0.attn.q.weight", r"it is a text encoder.*--text-encoder"),
        ("blocks.0.self_attn.q.weight", r"it is a WAN transformer\. Give it with --checkpoint"),
    ],
)
def test_another_model_is_refused_as_a_vae(key: str, found: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"this is not a VAE; {found}"):
        load_vae(tmp_path / "other.safetensors", CPU)


def test_quantised_and_damaged_weights_are_refused(small: Any, tmp_path: Path) -> None:
    file = write(small, tmp_path / "vae.safetensors", dtype=torch.float8_e4m3fn)
    with pytest.raises(BadTensor, match="it is F8_E4M3"):
        load_vae(file, CPU, small.config)
    broken = vae(SMALL)
    with torch.no_grad():
        broken.decoder.conv_in.weight[0, 0] = float("nan")
    file = write(broken, tmp_path / "broken.safetensors")
    with pytest.raises(BadTensor, match="NaN or infinite") as caught:
        load_vae(file, CPU, small.config)
    assert caught.value.key == "decoder.conv1.weight"
