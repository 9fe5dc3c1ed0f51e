"""Every variant of diffusers' WAN transformers at a small size, its inputs, and its weights as the original names them.

`original` writes the names of the original release; diffusers' own converter says in the tests whether it is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from wan_runtime.names import SPELLINGS, to_original

State = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 2,
    "in_channels": 16,
}
IMAGE = {"in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 128}
FACE = {
    "latent_channels": 16,
    "num_layers": 5,
    "motion_encoder_channel_sizes": {
        "4": 16, "8": 16, "16": 12, "32": 12, "64": 8, "128": 8, "256": 4, "512": 4,
    },
    "motion_style_dim": 16,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 32,
    "face_encoder_num_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A class of diffusers and what it is built from; `kind` is what its file's shapes make it."""

    cls: str = "WanTransformer3DModel"
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "base"


MODELS = {
    "t2v": Model(),
    "ti2v-5b": Model(config={"in_channels": 48, "out_channels": 48}),
    "i2v-a14b": Model(config={"in_channels": 36}),
    "i2v": Model(config=IMAGE),
    "flf2v": Model(config={**IMAGE, "pos_embed_seq_len": 10}),
    "vace": Model(
        "WanVACETransformer3DModel",
        {"num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 24},
        "vace",
    ),
    "animate": Model("WanAnimateTransformer3DModel", {**IMAGE, **FACE}, "animate"),
}


def built(name: str, seed: int = 0) -> Any:
    """The model in fp32 with random weights, in eval mode; zero-initialised parameters are filled too."""
    torch.manual_seed(seed)
    model = MODELS[name]
    made: nn.Module = getattr(diffusers, model.cls)(**{**SMALL, **model.config})
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if parameter.dim() < 2 or "pos_embed" in path or "padding_tokens" in path:
                base = 1.0 if ".norm" in path and path.endswith("weight") else 0.0
                parameter.copy_(base + 0.1 * torch.randn_like(parameter))
    for parameter in made.parameters():
        parameter.data = parameter.data.float()
    return made.eval()


def original(state: State) -> State:
    """A diffusers state dict as the original release names and cuts it."""
    tensors: State = {}
    for key, tensor in state.items():
        name = to_original(SPELLINGS["diffusers"], key)
        if key.startswith("motion_encoder.") and key.endswith("act_fn.bias"):
            tensors[name] = tensor.reshape(1, -1, 1, 1)
        elif ".to_k." in key and key.startswith("face_adapter."):
            tensors[name.replace("linear1_k.", "linear1_kv.")] = torch.cat(
                [tensor, state[key.replace(".to_k.", ".to_v.")]]
            )
        elif not (".to_v." in key and key.startswith("face_adapter.")):
            tensors[name] = tensor
    return tensors


def kernels(state: State) -> State:
    """The constant buffers that the original Animate keeps in its state dict: one for each blur."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = row[:, None] * row[None, :] / 64
    convs = "motion_encoder.enc.net_app.convs"
    if not any(key.startswith("motion_encoder.") for key in state):
        return {}
    return {
        f"{convs}.{n}.{place}.kernel": kernel.clone() for n in range(1, 8) for place in ("conv2.0", "skip.0")
    }


def converted(tensors: State) -> State:
    """An original state dict through diffusers' own single-file converter.

    It leaves `img_emb.emb_pos` as it is, which FLF2V's class names otherwise, as diffusers' conversion script knows.
    """
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    state: State = convert_wan_transformer_to_diffusers({key: t.clone() for key, t in tensors.items()})
    if "img_emb.emb_pos" in state:
        state["condition_embedder.image_embedder.pos_embed"] = state.pop("img_emb.emb_pos")
    return state


def linears(tensors: State) -> list[str]:
    """The modules that producers quantise, in an original state dict: blocks, VACE's blocks, the face adapter."""
    stacks = ("blocks.", "vace_blocks.", "face_adapter.")
    return [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.startswith(stacks) and key.endswith(".weight") and tensor.dim() == 2
    ]


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of one forward."""
    config = {**SMALL, **MODELS[name].config}
    make = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(dtype)

    frames = 2 if name == "animate" else 3
    given: dict[str, Any] = {
        "hidden_states": noise(1, config["in_channels"], frames, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 512, config["text_dim"]),
        "return_dict": False,
    }
    if "image_dim" in config:
        images = 2 if "pos_embed_seq_len" in config else 1
        given["encoder_hidden_states_image"] = noise(images, 5, config["image_dim"])
    if name == "vace":
        given["control_hidden_states"] = noise(1, 24, frames, 4, 4)
        given["control_hidden_states_scale"] = torch.ones(2, dtype=dtype)
    if name == "animate":
        given["pose_hidden_states"] = noise(1, 16, 1, 4, 4)
        given["face_pixel_values"] = noise(1, 3, 1, 512, 512)
    return given


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        result: torch.Tensor = model(**inputs(name, dtype))[0]
    return result
