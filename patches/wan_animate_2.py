"""diffusers' WanAnimate2Transformer3DModel, of diffusers 0.42 and later."""

from __future__ import annotations

import torch
from torch import nn

from wan_runtime import rules
from wan_runtime.errors import InvalidOption
from wan_runtime.names import Variant

from . import Host

MODULE, CLASS = "diffusers.models.transformers.transformer_wan_animate_2", "WanAnimate2Transformer3DModel"


def matches(model: nn.Module) -> bool:
    return any(cls.__name__ == CLASS and cls.__module__ == MODULE for cls in type(model).__mro__)


def build(variant: Variant) -> nn.Module:
    """The model a file's shapes describe, on meta. Raises InvalidOption for another kind of model."""
    import diffusers
    from accelerate import init_empty_weights

    if variant.kind != "animate_2":
        raise InvalidOption(
            f"the file is a {variant.name}; {CLASS} is Wan-Animate-2's. Use host='diffusers'."
        )
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: nn.Module = getattr(diffusers, CLASS)(
            in_dim=variant.in_channels,
            dim=variant.dim,
            ffn_dim=variant.ffn_dim,
            freq_dim=variant.freq_dim,
            text_dim=variant.text_dim,
            out_dim=variant.out_channels,
            num_heads=variant.heads,
            num_layers=variant.layers,
            use_img_emb=variant.image_dim is not None,
        )
    return model.eval().requires_grad_(False)


HOST = Host(
    name="wan_animate_2",
    spelling="diffusers_animate_2",
    classes=(f"{MODULE}:{CLASS}",),
    matches=matches,
    swaps=rules.swaps,
    fp32=rules.fp32,
    build=build,
)
