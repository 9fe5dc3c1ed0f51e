"""Wan-Animate-2's release: the original names, with every block wrapped in a module that holds it as `block`.

Source: diffusers, loaders/single_file_utils.py, convert_wan_animate_2_transformer_to_diffusers.
"""

from wan_runtime.names import Spelling

SPELLING = Spelling(
    name="animate_2",
    marks=("block.self_attn.", "block.cross_attn.", "block.ffn."),
    top={},
    block={f"block.{name}": name for name in ("self_attn", "cross_attn", "ffn", "norm3", "modulation")},
)
