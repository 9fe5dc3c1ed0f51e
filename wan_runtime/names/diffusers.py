"""diffusers' WanTransformer3DModel, WanVACETransformer3DModel and WanAnimateTransformer3DModel.

Source: diffusers, scripts/convert_wan_to_diffusers.py. The motion encoder's rows go two by two: its convolutions are
lists of [blur, convolution, activation] in the original, of which diffusers makes one module that holds its activation.
"""

from wan_runtime.names import Spelling

_CONVS = "motion_encoder.enc.net_app.convs"
_MOTION = {
    "motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
    "motion_encoder.motion_network": "motion_encoder.enc.fc",
    "motion_encoder.conv_in": f"{_CONVS}.0.0",
    "motion_encoder.conv_in.act_fn": f"{_CONVS}.0.1",
    "motion_encoder.conv_out": f"{_CONVS}.8",
} | {
    f"motion_encoder.res_blocks.{n}.{ours}": f"{_CONVS}.{n + 1}.{theirs}"
    for n in range(7)
    for ours, theirs in (
        ("conv1", "conv1.0"),
        ("conv1.act_fn", "conv1.1"),
        ("conv2", "conv2.1"),
        ("conv2.act_fn", "conv2.2"),
        ("conv_skip", "skip.1"),
    )
}
_FACE = {
    "face_encoder.conv1_local": "face_encoder.conv1_local.conv",
    "face_encoder.conv2": "face_encoder.conv2.conv",
    "face_encoder.conv3": "face_encoder.conv3.conv",
    "face_adapter.N.to_q": "face_adapter.fuser_blocks.N.linear1_q",
    # Halves of the original's linear1_kv, which no file has under these names.
    "face_adapter.N.to_k": "face_adapter.fuser_blocks.N.linear1_k",
    "face_adapter.N.to_v": "face_adapter.fuser_blocks.N.linear1_v",
    "face_adapter.N.to_out": "face_adapter.fuser_blocks.N.linear2",
    "face_adapter.N.norm_q": "face_adapter.fuser_blocks.N.q_norm",
    "face_adapter.N.norm_k": "face_adapter.fuser_blocks.N.k_norm",
}

SPELLING = Spelling(
    name="diffusers",
    halves=True,
    marks=("attn1.", "attn2.", "ffn.net."),
    top={
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.image_embedder": "img_emb",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
        "proj_out": "head.head",
        "scale_shift_table": "head.modulation",
        **_MOTION,
        **_FACE,
    },
    block={
        "scale_shift_table": "modulation",
        # The affine norm before cross-attention; the other two norms of a block carry no parameters in either host.
        "norm2": "norm3",
        "attn1.to_q": "self_attn.q",
        "attn1.to_k": "self_attn.k",
        "attn1.to_v": "self_attn.v",
        "attn1.to_out.0": "self_attn.o",
        "attn1.norm_q": "self_attn.norm_q",
        "attn1.norm_k": "self_attn.norm_k",
        "attn2.to_q": "cross_attn.q",
        "attn2.to_k": "cross_attn.k",
        "attn2.to_v": "cross_attn.v",
        "attn2.to_out.0": "cross_attn.o",
        "attn2.norm_q": "cross_attn.norm_q",
        "attn2.norm_k": "cross_attn.norm_k",
        "attn2.add_k_proj": "cross_attn.k_img",
        "attn2.add_v_proj": "cross_attn.v_img",
        "attn2.norm_added_k": "cross_attn.norm_k_img",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        # Of VACE's blocks alone: the first has the one, all have the other.
        "proj_in": "before_proj",
        "proj_out": "after_proj",
    },
)
