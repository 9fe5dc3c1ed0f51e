"""diffusers' WanTransformer3DModel (T2V, I2V, FLF2V, TI2V-5B, each expert of A14B), WanVACETransformer3DModel and
WanAnimateTransformer3DModel, Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wan_runtime import rules
from wan_runtime.errors import InvalidOption
from wan_runtime.names import LABELS, Variant

from . import Host
from ._wan_block import BLOCKS

MODULES = "diffusers.models.transformers"
CLASSES = {  # the kind of variant -> its class, and the module that holds it
    "base": ("transformer_wan", "WanTransformer3DModel"),
    "vace": ("transformer_wan_vace", "WanVACETransformer3DModel"),
    "animate": ("transformer_wan_animate", "WanAnimateTransformer3DModel"),
}


def matches(model: nn.Module) -> bool:
    names = {name for _, name in CLASSES.values()}
    return any(
        cls.__name__ in names and cls.__module__.startswith("diffusers.") for cls in type(model).__mro__
    )


def build(variant: Variant) -> nn.Module:
    """The model a file's shapes describe: parameters on meta, buffers (the RoPE tables) real.

    Raises InvalidOption for a kind of model that diffusers has no class for.
    """
    import diffusers
    from accelerate import init_empty_weights

    if variant.kind == "animate_2":
        raise InvalidOption(
            f"the file is a {variant.name}, whose class is another: load it with host='diffusers_animate_2'."
        )
    if variant.kind not in CLASSES:
        raise InvalidOption(
            f"the file is a {variant.name}, and diffusers has no class for {LABELS[variant.kind]}, so no model can be "
            "built from the file alone. Build it with its own release's code and load the file into it: "
            "wan_runtime.patch(model, checkpoint)."
        )
    cls = getattr(diffusers, CLASSES[variant.kind][1])
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: nn.Module = cls(**_config(variant))
    return model.eval().requires_grad_(False)


def _config(variant: Variant) -> dict[str, Any]:
    config: dict[str, Any] = {
        "num_attention_heads": variant.heads,
        "attention_head_dim": variant.dim // variant.heads,
        "in_channels": variant.in_channels,
        "out_channels": variant.out_channels,
        "text_dim": variant.text_dim,
        "freq_dim": variant.freq_dim,
        "ffn_dim": variant.ffn_dim,
        "num_layers": variant.layers,
        "image_dim": variant.image_dim,
        "added_kv_proj_dim": variant.dim if variant.image_dim else None,
        "pos_embed_seq_len": variant.image_tokens,
    }
    if variant.kind == "vace":
        config |= {"vace_layers": list(variant.vace_layers), "vace_in_channels": variant.vace_channels}
    if variant.animate is not None:
        face = variant.animate
        config |= {
            "latent_channels": face.pose_channels,
            "motion_encoder_channel_sizes": dict(face.channels),
            "motion_style_dim": face.style_dim,
            "motion_dim": face.motion_dim,
            "motion_encoder_dim": face.motion_out,
            "face_encoder_hidden_dim": face.face_dim,
            "face_encoder_num_heads": face.face_heads,
            "inject_face_latents_blocks": face.every,
        }
    return config


HOST = Host(
    name="wan_diffusers",
    spelling="diffusers",
    classes=tuple(f"{MODULES}.{module}:{name}" for module, name in CLASSES.values()),
    matches=matches,
    swaps=rules.swaps,
    fp32=rules.fp32,
    build=build,
    blocks=BLOCKS,
)
