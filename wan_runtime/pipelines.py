"""Builds diffusers' `WanPipeline` or `WanImageToVideoPipeline` around a checkpoint: its transformer(s) by
`wan_runtime.load`, the rest from a base.

A quantised checkpoint is one file with the transformer alone. The text encoder, VAE, tokenizer and scheduler (and of
Wan2.1 I2V the image encoder) come from a base: a diffusers directory or hub id. The parts are put together by hand,
each in the dtype that it needs (the VAE always in fp32), and checked against each other before anything is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_runtime.errors import InvalidOption
from wan_runtime.generating import Pipeline
from wan_runtime.parts import check_given
from wan_runtime.text_encoders import load_text_encoder
from wan_runtime.vaes import load_vae

if TYPE_CHECKING:
    import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT, IMAGE = "WanPipeline", "WanImageToVideoPipeline"  # diffusers' classes: what a clip starts from
A14B_BOUNDARY = {
    TEXT: 0.875,
    IMAGE: 0.9,
}  # where Wan2.2 A14B hands over to its low-noise expert, as published
MASK_CHANNELS = 4  # that an image-to-video transformer takes in beside the latents and the image's


def tiny_base() -> Path:
    """The bundled tiny pipeline, a diffusers directory."""
    from wan_runtime import tiny

    return Path(tiny.path())


def tiny_checkpoint() -> Path:
    """The bundled tiny model's transformer, bf16 under diffusers names."""
    return tiny_base() / "transformer" / WEIGHTS


def load_pipeline(
    checkpoint: Path | str | None = None,
    *,
    checkpoint_low: Path | str | None = None,
    base: Path | str | None = None,
    text_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **patch_options: Any,
) -> Pipeline:
    """A text-to-video or image-to-video pipeline around `checkpoint`, ready to generate.

    checkpoint      the transformer's file, of any dialect; None is the bundled tiny model
    checkpoint_low  the low-noise expert of a two-expert model (Wan2.2 A14B); `checkpoint` is then the high-noise one
    base            a diffusers directory or hub id for everything but the transformers; may be left out only for the
                    tiny model
    text_encoder, vae   diffusers directories or single .safetensors files that replace the base's part; a quantised
                    text encoder stays quantised
    device, dtype   default: the GPU in bf16 where there is one, else the CPU in fp32 (bf16 is five times slower there)

    `patch_options` go to `wan_runtime.load`. Raises InvalidOption for parts that do not fit each other, and what
    `load` raises for the file.
    """
    import torch

    from wan_runtime.api import load
    from wan_runtime.backends import device_named

    device = device_named(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    checkpoint = checkpoint or tiny_checkpoint()
    naming: dict[str, Any] = {
        name: patch_options[name] for name in ("dialect", "reference") if name in patch_options
    }
    check_given(checkpoint, checkpoint_low, text_encoder, vae, naming)
    base = str(base or _base_of(checkpoint, patch_options))
    index = _pipeline_config(base)
    _check_experts(index, base, checkpoint_low is not None)
    options = {"device": device, "dtype": dtype, **patch_options}
    transformers = {
        "transformer": load(checkpoint, **options),
        "transformer_2": load(checkpoint_low, **options) if checkpoint_low else None,
    }
    kind = _kind_of(transformers["transformer"])
    pipe = _assemble(kind, base, index, text_encoder, vae, device, dtype, {
        **transformers,
        "boundary_ratio": _boundary(index, base, kind, checkpoint_low is not None),
        "expand_timesteps": bool(index.get("expand_timesteps", False)),
    })  # fmt: skip
    _check_fit(pipe, base)
    return pipe


def _kind_of(transformer: Any) -> str:
    """The pipeline that a transformer is of. Raises InvalidOption where no pipeline of ours draws with it."""
    names = {cls.__name__ for cls in type(transformer).__mro__}
    config = transformer.config
    if "WanTransformer3DModel" not in names:
        raise InvalidOption(
            f"The checkpoint is a {type(transformer).__name__}, which loads and is patched, and no clips are made with "
            "it here: only with text-to-video and image-to-video models."
        )
    if getattr(config, "pos_embed_seq_len", None) is not None:
        raise InvalidOption(
            "The checkpoint is of a first-and-last-frame model (FLF2V), which needs two images; only models that start "
            "from one are served."
        )
    return IMAGE if config.in_channels > config.out_channels else TEXT


def _assemble(
    kind: str,
    base: str,
    index: dict[str, Any],
    text_encoder: Path | str | None,
    vae: Path | str | None,
    device: torch.device,
    dtype: torch.dtype,
    parts: dict[str, Any],
) -> Pipeline:
    import diffusers

    encoder, tokenizer = _text(base, text_encoder, device, dtype)
    if parts["transformer"].config.image_dim is not None:
        parts = {**parts, **_image_encoder(base, device)}
    pipe: Pipeline = getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(base, vae, device),
        scheduler=_part(getattr(diffusers, index["scheduler"][1]), base, "scheduler"),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _image_encoder(base: str, device: torch.device) -> dict[str, Any]:
    """CLIP and what prepares its input, of Wan2.1's I2V alone; in fp32, as it was published to be used."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionModel

    encoder = _part(CLIPVisionModel, base, "image_encoder", dtype=torch.float32, use_safetensors=True)
    return {
        "image_encoder": encoder.to(device).eval(),
        "image_processor": _part(CLIPImageProcessor, base, "image_processor"),
    }


def _part(cls: Any, base: str, folder: str, given: Path | str | None = None, **options: Any) -> Any:
    """One part of the pipeline by its own class, from a folder of its own or from the base."""
    where = (str(given), {}) if given else (base, {"subfolder": folder})
    try:
        return cls.from_pretrained(where[0], **where[1], **options)
    except (OSError, ValueError) as error:
        raise InvalidOption(f"No {folder} could be read from {where[0]!r}: {error}") from error


def _text(base: str, given: Path | str | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The text encoder, and the tokenizer: the base's, or the one in the encoder's own file where the base has none."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    if given is None or Path(given).is_dir():
        encoder = _part(UMT5EncoderModel, base, "text_encoder", given, dtype=dtype, use_safetensors=True)
        return encoder.to(device).eval(), _part(AutoTokenizer, base, "tokenizer")
    encoder, own = load_text_encoder(given, device, dtype)
    try:
        return encoder, _part(AutoTokenizer, base, "tokenizer")
    except InvalidOption:
        if own is None:
            raise
        return encoder, own


def _vae(base: str, given: Path | str | None, device: torch.device) -> Any:
    """The VAE, in fp32: what it rounds shows in every clip."""
    from diffusers import AutoencoderKLWan

    if given is None or Path(given).is_dir():
        vae = _part(AutoencoderKLWan, base, "vae", given, use_safetensors=True)
        return vae.to(device).eval()
    try:
        config = AutoencoderKLWan.load_config(base, subfolder="vae")
    except (OSError, ValueError):
        config = None  # the base need not have the part that this file takes the place of
    return load_vae(given, device, config)


def _base_of(checkpoint: Path | str, patch_options: Mapping[str, Any]) -> Path:
    """The bundled base, if the checkpoint is of the tiny model's sizes; every other needs its own."""
    from wan_runtime.api import inspect

    reference = patch_options.get("reference")  # of the same model, and never in doubt
    found = inspect(reference or checkpoint, dialect=None if reference else patch_options.get("dialect"))
    if found.sizes == inspect(tiny_checkpoint()).sizes:
        return tiny_base()
    raise InvalidOption(
        f"{checkpoint} holds the transformer alone, of {found.variant}. Name the diffusers directory or hub id that "
        "has its text encoder, VAE, tokenizer and scheduler with --base, such as "
        "--base Wan-AI/Wan2.1-T2V-14B-Diffusers."
    )


def _pipeline_config(base: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(base)
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"--base {base} is not a diffusers directory (with a model_index.json) nor a hub id that can be reached: "
            f"{error}"
        ) from error
    if index.get("_class_name") not in (TEXT, IMAGE):
        raise InvalidOption(
            f"--base {base} is a {index.get('_class_name')}; this makes clips with a {TEXT} or a {IMAGE}."
        )
    return index


def _check_experts(index: dict[str, Any], base: str, two_experts: bool) -> None:
    if index.get("boundary_ratio") is not None and not two_experts:
        raise InvalidOption(
            f"--base {base} is of a model with two experts (boundary_ratio {index['boundary_ratio']}), and one "
            "checkpoint was given. Give the high-noise file as --checkpoint and the low-noise file as --checkpoint-low."
        )


def _boundary(index: dict[str, Any], base: str, kind: str, two_experts: bool) -> float | None:
    boundary = index.get("boundary_ratio")
    if boundary is None:
        return A14B_BOUNDARY[kind] if two_experts else None
    if index["_class_name"] != kind:
        raise InvalidOption(
            f"--base {base} is of a {index['_class_name']}, and the checkpoints are of a {kind}: the two hand over to "
            "the low-noise expert at different steps. Give the base of this model."
        )
    return float(boundary)


def _check_fit(pipe: Pipeline, base: str) -> None:
    """The parts' widths must agree: where they do not, diffusers fails in the middle of a clip, or draws noise."""
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name)
        if model is None:
            continue
        latents = pipe.vae.config.z_dim
        from_image = model.config.in_channels > model.config.out_channels
        pairs = {
            "text width": (model.config.text_dim, pipe.text_encoder.config.d_model),
            "latent channels in": (
                model.config.in_channels,
                2 * latents + MASK_CHANNELS if from_image else latents,
            ),
            "latent channels out": (model.config.out_channels, latents),
        }
        encoder = getattr(pipe, "image_encoder", None)
        if encoder is not None:
            pairs["image width"] = (model.config.image_dim, encoder.config.hidden_size)
        wrong = [f"{what} {has}, base {wants}" for what, (has, wants) in pairs.items() if has != wants]
        if wrong:
            raise InvalidOption(f"The {name} does not fit --base {base}: {'; '.join(wrong)}.")
