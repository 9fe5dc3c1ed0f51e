"""diffusers' WanTransformer3DModel: text-to-video and TI2V-5B (Wan 2.1 and 2.2)."""

from __future__ import annotations

from torch import nn

from wan_runtime import rules
from wan_runtime.names import Variant

from . import Host

CLASS = "WanTransformer3DModel"


def matches(model: nn.Module) -> bool:
    return any(
        cls.__name__ == CLASS and cls.__module__.startswith("diffusers.") for cls in type(model).__mro__
    )


def build(variant: Variant) -> nn.Module:
    """The model a file's shapes describe: parameters on meta, buffers (the RoPE tables) real."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights(include_buffers=False):
        model: nn.Module = WanTransformer3DModel(
            num_attention_heads=variant.heads,
            attention_head_dim=variant.dim // variant.heads,
            in_channels=variant.in_channels,
            out_channels=variant.out_channels,
            text_dim=variant.text_dim,
            freq_dim=variant.freq_dim,
            ffn_dim=variant.ffn_dim,
            num_layers=variant.layers,
            image_dim=variant.image_dim,
            added_kv_proj_dim=variant.dim if variant.image_dim else None,
        )
    return model.eval().requires_grad_(False)


HOST = Host(
    name="wan_diffusers",
    spelling="diffusers",
    classes=(f"diffusers.models.transformers.transformer_wan:{CLASS}",),
    matches=matches,
    swaps=rules.swaps,
    fp32=rules.fp32,
    build=build,
)
