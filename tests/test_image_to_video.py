"""Clips that start from an image, against diffusers' own pipeline called by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.builders import image_to_video
from tests.builders.image_to_video import SMALL
from tests.test_cli import quick
from wan_runtime.asking import ClipRequest
from wan_runtime.bases import tiny_base, tiny_checkpoint
from wan_runtime.errors import InvalidOption, InvalidRequest
from wan_runtime.generating import clip_profile, generate
from wan_runtime.pipelines import load_pipeline
from wan_runtime.starting import StartImage, open_image

PROMPT = "a large red circle moving right on a black background"
QUICK: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
Made = tuple[Path, Path]


def picture(colour: str, size: tuple[int, int] = (96, 64)) -> StartImage:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return open_image(out.getvalue())


def wan22(folder: Path) -> Made:
    return image_to_video.wan22(folder), tiny_base()


def ti2v_small(folder: Path) -> Made:
    """The trained tiny model with a timestep a token."""
    return tiny_checkpoint(), image_to_video.base(folder / "base", expand_timesteps=True)


KINDS: dict[str, tuple[Callable[[Path], Made], str, dict[str, Any]]] = {
    "wan2.2 i2v": (wan22, "required", {}),
    "wan2.1 i2v with clip": (image_to_video.wan21, "required", {}),
    "ti2v": (ti2v_small, "optional", {}),
    "ti2v of 48 channels": (image_to_video.ti2v, "optional", {}),
}


def ask(pipe: Any, image: StartImage | None) -> ClipRequest:
    return clip_profile(pipe).request(PROMPT, **QUICK, image=image and image.sha256)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {kind: build(tmp_path_factory.mktemp("i2v")) for kind, (build, *_) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_is_that_of_diffusers_own_pipeline(kind: str, made: dict[str, Made]) -> None:
    checkpoint, base = made[kind]
    pipe = load_pipeline(checkpoint, base=base, device="cpu")
    assert clip_profile(pipe).takes_image == KINDS[kind][1]
    start = picture("orange")
    frames = generate(pipe, ask(pipe, start), image=start).frames
    config = pipe.transformer.config
    sizes = {**SMALL, "num_layers": config.num_layers, "num_attention_heads": config.num_attention_heads}
    for name in ("in_channels", "out_channels", "image_dim", "added_kv_proj_dim", "ffn_dim", "freq_dim"):
        sizes[name] = config[name]
    plain = diffusers.WanTransformer3DModel(**sizes)
    plain.load_state_dict({name: tensor.float() for name, tensor in load_file(checkpoint).items()})
    expands = json.loads((base / "model_index.json").read_text())["expand_timesteps"]
    parts = {name: part for name, part in pipe.components.items() if not name.startswith("transformer")}
    own = diffusers.WanImageToVideoPipeline(**parts, transformer=plain.eval(), expand_timesteps=expands)
    own.set_progress_bar_config(disable=True)
    wanted = own(
        image=Image.new("RGB", (64, 64), "orange"), prompt=PROMPT, negative_prompt="", width=64, height=64,
        num_frames=5, num_inference_steps=2, guidance_scale=clip_profile(pipe).guidance_scale,
        generator=torch.Generator().manual_seed(1), output_type="np",
    ).frames[0]  # fmt: skip
    assert np.abs(frames.astype(int) - np.rint(wanted * 255).astype(int)).max() <= 1
    other = picture("blue")
    assert np.abs(generate(pipe, ask(pipe, other), image=other).frames.astype(int) - frames).max() > 8


def test_of_ti2v_the_first_frame_is_the_image(made: dict[str, Made]) -> None:
    checkpoint, base = made["ti2v"]
    pipe = load_pipeline(checkpoint, base=base, device="cpu")
    start = picture("orange")
    first = generate(pipe, ask(pipe, start), image=start).frames[0].astype(float)
    assert (
        np.abs(first - np.asarray(Image.new("RGB", (64, 64), "orange"), float)).mean() < 12
    )  # through the VAE
    without = generate(pipe, ask(pipe, None)).frames[0].astype(float)
    assert np.abs(without - first).mean() > 12


def test_two_experts_start_from_one_image(tmp_path: Path) -> None:
    high, low = (
        image_to_video.wan22(tmp_path / "high_noise"),
        image_to_video.wan22(tmp_path / "low_noise", 1.1),
    )
    pipe = load_pipeline(high, checkpoint_low=low, base=tiny_base(), device="cpu")
    assert pipe.config.boundary_ratio == 0.9
    used = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: used.append(name))
    start = picture("orange")
    request = clip_profile(pipe).request(
        PROMPT, **{**QUICK, "num_inference_steps": 4}, guidance_scale=1.0, image=start.sha256
    )
    generate(pipe, request, image=start)
    assert used[0] == "transformer" and used[-1] == "transformer_2" and len(used) == 4


def test_what_the_model_does_not_take_or_lacks_is_refused(made: dict[str, Made]) -> None:
    start = picture("orange")
    with pytest.raises(InvalidRequest) as unwanted:
        ask(load_pipeline(device="cpu"), start)
    assert (unwanted.value.param, unwanted.value.code) == ("image", "image_unsupported")
    checkpoint, base = made["wan2.2 i2v"]
    pipe = load_pipeline(checkpoint, base=base, device="cpu")
    with pytest.raises(InvalidRequest) as missing:
        ask(pipe, None)
    assert (missing.value.param, missing.value.code) == ("image", "image_required")
    with pytest.raises(InvalidRequest, match="names the start image"):
        generate(pipe, ask(pipe, start), image=picture("blue"))
    with pytest.raises(InvalidRequest, match="names the start image"):
        generate(pipe, ask(pipe, start))


def test_a_base_without_the_image_encoder_is_refused(made: dict[str, Made]) -> None:
    with pytest.raises(InvalidOption, match=r"lacks 2 of the parts .*: image_encoder \(.*image_processor \("):
        load_pipeline(made["wan2.1 i2v with clip"][0], base=tiny_base(), device="cpu")


def test_a_boundary_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    high, low = (
        image_to_video.wan22(tmp_path / "high_noise"),
        image_to_video.wan22(tmp_path / "low_noise", 1.1),
    )
    base = image_to_video.base(tmp_path / "base", boundary_ratio=0.875)
    with pytest.raises(InvalidOption, match="different steps"):
        load_pipeline(high, checkpoint_low=low, base=base, device="cpu")


def test_models_of_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        **SMALL, in_channels=36, out_channels=16, image_dim=64, added_kv_proj_dim=128, pos_embed_seq_len=10
    )
    with pytest.raises(InvalidOption, match="two images"):
        load_pipeline(image_to_video._saved(model, tmp_path), base=tiny_base(), device="cpu")


def test_the_command_starts_a_clip_from_an_image(made: dict[str, Made], tmp_path: Path) -> None:
    checkpoint, base = made["wan2.2 i2v"]
    Image.new("RGB", (96, 64), "orange").save(tmp_path / "start.png")
    common = ["generate", "--checkpoint", str(checkpoint), "--base", str(base), "--prompt", PROMPT, "--size", "64x64",
              "--frames", "5", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "clip.mp4")]  # fmt: skip
    status, _, said = quick(*common, "--image", str(tmp_path / "start.png"))
    assert status == 0, said
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    status, _, said = quick(*common)
    assert status == 2 and "starts from an image" in said
    (tmp_path / "text.png").write_text("hello")
    status, _, said = quick(*common, "--image", str(tmp_path / "text.png"))
    assert status == 2 and "is no PNG, JPEG or WEBP file" in said
    status, _, said = quick(*common, "--image", str(tmp_path / "gone.png"))
    assert status == 2 and "gone.png cannot be read" in said
