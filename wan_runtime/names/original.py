"""The original release (Wan-Video/Wan2.1, Wan2.2) and what derives from it: ComfyUI, LightX2V, DiffSynth."""

from wan_runtime.names import Spelling

SPELLING = Spelling(
    name="original", marks=("self_attn.", "cross_attn.", "ffn.0.", "ffn.2."), top={}, block={}
)
