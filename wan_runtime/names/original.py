"""The original release (Wan-Video/Wan2.1, Wan2.2) and what derives from it: ComfyUI, LightX2V, DiffSynth, FastVideo's loader."""

from wan_runtime.names import Spelling

SPELLING = Spelling(name="original", mark="blocks.0.self_attn.", top={}, block={})
