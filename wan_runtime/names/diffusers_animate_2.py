"""diffusers' WanAnimate2Transformer3DModel: the original names but for the attentions' Linears.

Source: diffusers, loaders/single_file_utils.py, convert_wan_animate_2_transformer_to_diffusers.
"""

from wan_runtime.names import Spelling

_LINEARS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_IMAGE = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}

SPELLING = Spelling(
    name="diffusers_animate_2",
    marks=("self_attn.to_", "cross_attn.to_"),
    shares=("original",),  # the feed-forward's names
    top={},
    block={
        **{f"self_attn.{ours}": f"self_attn.{theirs}" for ours, theirs in _LINEARS.items()},
        **{f"cross_attn.{ours}": f"cross_attn.{theirs}" for ours, theirs in (_LINEARS | _IMAGE).items()},
    },
)
