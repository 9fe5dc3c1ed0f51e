"""Any module tree under the original release's names: Wan-Video/Wan2.1 and Wan2.2, DiffSynth-Studio and their forks."""

from __future__ import annotations

from torch import nn

from wan_runtime import rules

from . import Host
from ._original_block import BLOCKS

MARKS = ("patch_embedding", "blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.0.ffn.0", "head.head")


def matches(model: nn.Module) -> bool:
    modules = dict(model.named_modules())
    return all(mark in modules or f"{mark}.base_layer" in modules for mark in MARKS)


HOST = Host(
    name="wan_original",
    spelling="original",
    classes=("wan.modules.model:WanModel", "diffsynth.models.wan_video_dit:WanModel"),
    matches=matches,
    swaps=rules.swaps,
    fp32=rules.fp32,
    blocks=BLOCKS,
)
