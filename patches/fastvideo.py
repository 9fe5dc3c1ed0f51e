"""FastVideo's served WanTransformer3DModel: text-to-video, Wan 2.1 and 2.2.

Its linears are ReplicatedLinear, of vLLM's family: they answer (output, None). FastVideo renames a diffusers checkpoint
as it loads it, so its module names are in no file and are kept here. Source: fastvideo/models/dits/wanvideo.py and
fastvideo/configs/models/dits/wanvideo.py (param_names_mapping) of fastvideo 0.2.1.
"""

from __future__ import annotations

from torch import nn

from wan_runtime import rules
from wan_runtime.names import Spelling

from . import Host

MODULE, CLASS = "fastvideo.models.dits.wanvideo", "WanTransformer3DModel"


def matches(model: nn.Module) -> bool:
    return any(cls.__name__ == CLASS and cls.__module__ == MODULE for cls in type(model).__mro__)


NAMES = Spelling(
    name="fastvideo",
    marks=("self_attn_residual_norm.",),
    top={
        "patch_embedding.proj": "patch_embedding",
        "condition_embedder.time_embedder.mlp.fc_in": "time_embedding.0",
        "condition_embedder.time_embedder.mlp.fc_out": "time_embedding.2",
        "condition_embedder.time_modulation.linear": "time_projection.1",
        "condition_embedder.text_embedder.fc_in": "text_embedding.0",
        "condition_embedder.text_embedder.fc_out": "text_embedding.2",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.fc_in": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.fc_out": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "proj_out": "head.head",
        "scale_shift_table": "head.modulation",
    },
    block={
        "scale_shift_table": "modulation",
        "self_attn_residual_norm.norm": "norm3",
        "to_q": "self_attn.q",
        "to_k": "self_attn.k",
        "to_v": "self_attn.v",
        "to_out": "self_attn.o",
        "norm_q": "self_attn.norm_q",
        "norm_k": "self_attn.norm_k",
        "attn2.to_q": "cross_attn.q",
        "attn2.to_k": "cross_attn.k",
        "attn2.to_v": "cross_attn.v",
        "attn2.to_out": "cross_attn.o",
        "attn2.norm_q": "cross_attn.norm_q",
        "attn2.norm_k": "cross_attn.norm_k",
        "attn2.add_k_proj": "cross_attn.k_img",
        "attn2.add_v_proj": "cross_attn.v_img",
        "attn2.norm_added_k": "cross_attn.norm_k_img",
        "ffn.fc_in": "ffn.0",
        "ffn.fc_out": "ffn.2",
    },
)

HOST = Host(
    name="fastvideo",
    spelling=NAMES,
    classes=(f"{MODULE}:{CLASS}",),
    matches=matches,
    swaps=rules.swaps,
    fp32=rules.fp32,
)
