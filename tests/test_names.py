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
    "another transformer": ["double_blocks.0.img_attn.qkv.weight"],
    "a VACE part alone": ["vace_blocks.0.self_attn.q.weight"],
    "an empty file": [],
}
PARTS = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": r"a text encoder: UMT5 under transformers.*--text-encoder",
    "blocks.0.attn.q.weight": r"a text encoder: UMT5 under the original.*--text-encoder",
    "text_encoder.blocks.0.attn.q.weight": "a text encoder",
    "encoder.downsamples.0.residual.0.gamma": r"a VAE: the Wan2\.1 VAE under the original.*--vae",
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": r"a VAE: the Wan2\.2 VAE.*--vae",
    "encoder.down_blocks.0.norm1.gamma": r"a VAE: the Wan2\.1 VAE under diffusers' names.*--vae",
    "encoder.down_blocks.0.resnets.0.norm1.gamma": r"a VAE: the Wan2\.2 VAE.*--vae",
    "vision_model.embeddings.class_embedding": "a CLIP image encoder",
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_told_apart(what: str) -> None:
    with pytest.raises(CheckpointError, match="not a WAN transformer") as caught:
        naming_of(FILE, OTHERS[what])
    assert all(key in str(caught.value) for key in OTHERS[what])


@pytest.mark.parametrize("key", PARTS)
def test_a_part_of_the_pipeline_is_named_with_its_place(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"not a WAN transformer but {PARTS[key]}"):
        naming_of(FILE, [key])


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
        (TINY, "unlisted WAN variant"),
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


BIG = rows(Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256))
I2V = rows(Sizes(dim=5120, ffn=13824, layers=40, text=4096, freq=256, channels=36, image=1280))


def vace(layers: int, dim: int = 5120) -> dict[str, tuple[int, ...]]:
    """What VACE has beside a text-to-video model."""
    blocks = {f"vace_blocks.{n}.after_proj.weight": (dim, dim) for n in range(layers)}
    return {"vace_patch_embedding.weight": (dim, 96, 1, 2, 2), **blocks}


def animate() -> dict[str, tuple[int, ...]]:
    """What Animate-14B has beside an image-to-video model: the tensors that decide a size."""
    convs = "motion_encoder.enc.net_app.convs"
    channels = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512, 6: 512, 7: 512}
    return {
        f"{convs}.0.0.weight": (32, 3, 1, 1),
        **{f"{convs}.{n}.conv2.1.weight": (out, 32, 3, 3) for n, out in channels.items()},
        f"{convs}.8.weight": (512, 512, 4, 4),
        "motion_encoder.enc.fc.0.weight": (512, 512),
        "motion_encoder.dec.direction.weight": (512, 20),
        "face_encoder.conv1_local.conv.weight": (4096, 512, 3),
        "face_encoder.conv2.conv.weight": (1024, 1024, 3),
        "pose_patch_embedding.weight": (5120, 16, 1, 2, 2),
        **{f"face_adapter.fuser_blocks.{n}.linear1_kv.weight": (10240, 5120) for n in range(8)},
    }


def test_a_first_last_frame_model_is_told_by_its_positions() -> None:
    variant = variant_of(FILE, {row[0]: row[2] for row in I2V} | {"img_emb.emb_pos": (1, 514, 1280)})
    assert (variant.name, variant.kind, variant.image_tokens) == ("FLF2V-14B", "base", 514)


def test_vace_blocks_are_spread_evenly() -> None:
    variant = variant_of(FILE, {row[0]: row[2] for row in BIG} | vace(8))
    assert (variant.name, variant.vace_layers) == ("VACE-14B", (0, 5, 10, 15, 20, 25, 30, 35))
    small = rows(Sizes(dim=1536, ffn=8960, layers=30, text=4096, freq=256))
    variant = variant_of(FILE, {row[0]: row[2] for row in small} | vace(15, 1536))
    assert (variant.name, variant.vace_channels) == ("VACE-1.3B", 96)
    assert variant.vace_layers == tuple(range(0, 30, 2))
    with pytest.raises(CheckpointError, match="7 VACE blocks do not go evenly with 40"):
        variant_of(FILE, {row[0]: row[2] for row in BIG} | vace(7))


def test_animate_is_described_as_published() -> None:
    """The sizes that diffusers' class has by default are the published model's."""
    variant = variant_of(FILE, {row[0]: row[2] for row in I2V} | animate())
    face = variant.animate
    assert face is not None and variant.name == "Animate-14B"
    assert (face.motion_dim, face.motion_out, face.style_dim, face.every) == (20, 512, 512, 5)
    assert (face.face_dim, face.face_heads, face.pose_channels) == (1024, 4, 16)
    from diffusers.models.transformers import transformer_wan_animate

    published = dict(transformer_wan_animate.WAN_ANIMATE_MOTION_ENCODER_CHANNEL_SIZES)
    del published["1024"]
    assert face.channels == published


def test_an_animate_without_its_motion_encoder_is_refused() -> None:
    shapes = {key: s for key, s in animate().items() if not key.startswith("motion_encoder")}
    with pytest.raises(CheckpointError, match="the motion encoder has -2 blocks"):
        variant_of(FILE, {row[0]: row[2] for row in I2V} | shapes)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("casual_audio_encoder.encoder.conv1_local.weight", "S2V-14B"),
        ("audio_proj.audio_proj_glob_1.layer.weight", "unlisted HuMo"),
        ("control_adapter.conv.weight", "unlisted WAN Fun-Camera"),
        ("ref_conv.weight", "unlisted WAN Fun-Control"),
    ],
)
def test_a_kind_is_told_by_its_own_modules(key: str, named: str) -> None:
    variant = variant_of(FILE, {row[0]: row[2] for row in BIG} | {key: (8, 8)})
    assert variant.name.startswith(named)


def test_modules_of_two_kinds_are_no_known_model() -> None:
    shapes = {row[0]: row[2] for row in BIG} | vace(8) | {"ref_conv.weight": (8, 8)}
    with pytest.raises(CheckpointError, match=r"WAN VACE .vace_patch_embedding.*WAN Fun-Control .ref_conv"):
        variant_of(FILE, shapes)


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
    for spelling in ("original", "diffusers"):
        assert {f"{path}.weight" for path in block_linears(TINY, spelling)} <= set(_keys(TINY, spelling))
