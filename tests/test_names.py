"""Names against diffusers: its own converter is the oracle of the renames, its own model of the keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders.wan import TINY, Sizes, block_linears, rows, state
from wan_runtime.errors import BadTensor, CheckpointError
from wan_runtime.names import SPELLINGS, from_original, naming_of, to_original, variant_of, without_prefix

FILE = Path("model.safetensors")
VARIANTS = {
    "t2v": TINY,
    "t2v deep": Sizes(layers=12),
    "ti2v-5b": Sizes(channels=48),
    "i2v": Sizes(channels=36, image=64),
}
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "net.",
    "model.",
    "transformer.",
    "_orig_mod.",
    "module.",
    "model.diffusion_model._orig_mod.",
)


@pytest.fixture(params=list(SPELLINGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _keys(sizes: Sizes, spelling: str) -> list[str]:
    return list(state(sizes, spelling=spelling))


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_own_converter_agrees(variant: str) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    for key in _keys(VARIANTS[variant], "original"):
        [converted] = convert_wan_transformer_to_diffusers({key: torch.zeros(1)})
        assert from_original(SPELLINGS["diffusers"], key) == converted
        assert to_original(SPELLINGS["diffusers"], converted) == key


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_own_model_has_exactly_these_keys_and_shapes(variant: str) -> None:
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    sizes = VARIANTS[variant]
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel(
            num_attention_heads=sizes.dim // 128,
            attention_head_dim=128,
            in_channels=sizes.channels,
            out_channels=16,
            text_dim=sizes.text,
            freq_dim=sizes.freq,
            ffn_dim=sizes.ffn,
            num_layers=sizes.layers,
            image_dim=sizes.image,
            added_kv_proj_dim=sizes.dim if sizes.image else None,
        )
    theirs = {
        to_original(SPELLINGS["diffusers"], key): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
    }
    assert theirs == {row[0]: row[2] for row in rows(sizes)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_spelling_is_undone_by_its_inverse(name: str, variant: str) -> None:
    originals = _keys(VARIANTS[variant], "original")
    spelled = [from_original(SPELLINGS[name], key) for key in originals]
    assert [to_original(SPELLINGS[name], key) for key in spelled] == originals
    assert len(set(spelled)) == len(spelled)


def test_every_spelling_names_a_marked_module(name: str) -> None:
    """A spelling without a key that carries its mark could never be recognised."""
    spelled = [from_original(SPELLINGS[name], key) for key in _keys(TINY, "original")]
    found, prefix = naming_of(FILE, spelled)
    assert (found.name, prefix) == (name, "")


def test_a_scale_is_renamed_with_its_layer() -> None:
    for leaf in ("weight_scale", "scale_weight", "comfy_quant", "input_scale"):
        path = f"blocks.11.self_attn.o.{leaf}"
        assert from_original(SPELLINGS["diffusers"], path) == f"blocks.11.attn1.to_out.0.{leaf}"


def test_components_are_renamed_whole() -> None:
    """Plain text replacement would turn these into other modules."""
    diffusers = SPELLINGS["diffusers"]
    for path in ("blocks.1.ffn.20.weight", "blocks.1.norm30.weight", "head.header.weight", "blocks.1.norm2x"):
        assert from_original(diffusers, path) == path
    # The affine norm is the original's third and diffusers' second; applied twice a rename would swap it back.
    assert to_original(diffusers, "blocks.0.norm2.weight") == "blocks.0.norm3.weight"
    assert from_original(diffusers, "blocks.0.norm3.weight") == "blocks.0.norm2.weight"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_found_and_taken_off(name: str, prefix: str) -> None:
    keys = [prefix + from_original(SPELLINGS[name], key) for key in _keys(TINY, "original")]
    spelling, found = naming_of(FILE, keys)
    assert (spelling.name, found) == (name, prefix)
    assert [prefix + without_prefix(key) for key in keys] == keys


def test_one_module_under_two_spellings_is_named() -> None:
    keys = [*_keys(TINY, "original"), "blocks.1.attn2.to_k.weight"]
    with pytest.raises(BadTensor, match="two spellings") as caught:
        naming_of(FILE, keys)
    assert caught.value.key == "blocks.1.attn2.to_k.weight"
    assert "'blocks.1.cross_attn.k.weight'" in str(caught.value)


def test_one_module_under_two_prefixes_is_named() -> None:
    keys = [*_keys(TINY, "original"), "model.diffusion_model.blocks.1.ffn.0.bias"]
    with pytest.raises(BadTensor, match="two prefixes") as caught:
        naming_of(FILE, keys)
    assert caught.value.key == "model.diffusion_model.blocks.1.ffn.0.bias"
    assert "'blocks.1.ffn.0.bias'" in str(caught.value)


OTHERS = {
    "UMT5 as transformers names it": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "UMT5 as the original release names it": ["blocks.0.attn.q.weight", "token_embedding.weight"],
    "the VAE": ["encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"],
    "another transformer": ["double_blocks.0.img_attn.qkv.weight"],
    "a VACE part alone": ["vace_blocks.0.self_attn.q.weight"],
    "an empty file": [],
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_told_apart(what: str) -> None:
    with pytest.raises(CheckpointError, match="not a WAN transformer") as caught:
        naming_of(FILE, OTHERS[what])
    assert all(key in str(caught.value) for key in OTHERS[what])


@pytest.mark.parametrize(
    "key",
    ["diffusion_model.blocks.0.self_attn.q.lora_down.weight", "blocks.0.attn1.to_q.lora_A.weight"],
)
def test_a_lora_is_told_apart(key: str) -> None:
    with pytest.raises(CheckpointError, match=r"is a LoRA.*load_lora_weights"):
        naming_of(FILE, [key])


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (Sizes(dim=1536, ffn=8960, layers=30, text=4096, freq=256), "T2V-1.3B"),
        (Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256), "T2V-14B"),
        (Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256, channels=36, image=1280), "I2V-14B"),
        (Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256, channels=36), "I2V-A14B"),
        (Sizes(dim=3072, ffn=14336, layers=30, text=4096, freq=256, channels=48), "TI2V-5B"),
        (TINY, "unlisted"),
    ],
)
def test_the_shapes_name_the_variant(sizes: Sizes, named: str) -> None:
    variant = variant_of(FILE, {row[0]: row[2] for row in rows(sizes)})
    assert variant.name.startswith(named)
    assert (variant.dim, variant.ffn_dim, variant.layers) == (sizes.dim, sizes.ffn, sizes.layers)
    assert (variant.in_channels, variant.text_dim, variant.freq_dim) == (
        sizes.channels,
        sizes.text,
        sizes.freq,
    )
    assert (variant.heads, variant.image_dim, variant.out_channels) == (sizes.dim // 128, sizes.image, 16)


@pytest.mark.parametrize(
    "key", ["head.head.weight", "patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight"]
)
def test_a_tensor_that_decides_a_size_must_be_there(key: str) -> None:
    shapes = {row[0]: row[2] for row in rows()}
    del shapes[key]
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        variant_of(FILE, shapes)


def test_a_width_that_no_head_divides_is_refused() -> None:
    shapes = {row[0]: row[2] for row in rows()} | {"head.head.weight": (64, 130)}
    with pytest.raises(BadTensor, match="130 is not a multiple of the head size 128") as caught:
        variant_of(FILE, shapes)
    assert caught.value.key == "head.head.weight"


def test_block_linears_are_modules_of_the_table() -> None:
    for spelling in SPELLINGS:
        assert {f"{path}.weight" for path in block_linears(TINY, spelling)} <= set(_keys(TINY, spelling))
