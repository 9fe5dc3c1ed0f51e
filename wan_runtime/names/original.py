"""The original release (Wan-Video/Wan2.1, Wan2.2) and what derives from it: ComfyUI, LightX2V, DiffSynth."""

from wan_runtime.names import Spelling

SPELLING = Spelling(
    name="original",
    marks=("self_attn.q.", "self_attn.k.", "cross_attn.q.", "cross_attn.k.", "ffn.0.", "ffn.2."),
    top={},
    block={},
)
