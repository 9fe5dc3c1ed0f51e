"""Builds diffusers' `WanPipeline` or `WanImageToVideoPipeline` around a checkpoint: its transformer(s) by
`wan_runtime.load`, the rest from a base.

A quantised checkpoint is one file with the transformer alone. The text encoder, VAE, tokenizer and scheduler (and of
Wan2.1 I2V the image encoder) come from a base: a diffusers directory or hub id. The parts are put together by hand,
each in the dtype that it needs (the VAE always in fp32), and checked against each other before anything is generated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_runtime.bases import Base
from wan_runtime.errors import InvalidOption
from wan_runtime.generating import Pipeline
from wan_runtime.preparing import Prepared, prepare
from wan_runtime.report import Report
from wan_runtime.text_encoders import load_text_encoder
from wan_runtime.vaes import load_vae

if TYPE_CHECKING:
    import torch

MASK_CHANNELS = 4  # that an image-to-video transformer takes in beside the latents and the image's


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
    return load_prepared(prepare(
        checkpoint, checkpoint_low=checkpoint_low, base=base, text_encoder=text_encoder, vae=vae, device=device,
        dtype=dtype, **patch_options,
    ))  # fmt: skip


def load_prepared(found: Prepared) -> Pipeline:
    """`load_pipeline` of parts that were looked at already."""
    from wan_runtime.api import load

    scheduler = _scheduler(found.base)
    options = {"device": found.device, "dtype": found.dtype, **found.options}
    transformers = {
        "transformer": load(found.checkpoint, **options),
        "transformer_2": load(found.checkpoint_low, **options) if found.checkpoint_low else None,
    }
    pipe = _assemble(found, {
        **transformers,
        "scheduler": scheduler,
        "boundary_ratio": found.boundary,
        "expand_timesteps": found.expand_timesteps,
    })  # fmt: skip
    _check_fit(pipe, found.base.name)
    return pipe


@dataclass(frozen=True)
class PipelinePlan:
    """What `load_pipeline` would make: the base, None of its index where the hub was not asked; each transformer's
    report."""

    base: Base
    reports: tuple[Report, ...]


def plan_pipeline(
    checkpoint: Path | str | None = None,
    *,
    checkpoint_low: Path | str | None = None,
    base: Path | str | None = None,
    text_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **patch_options: Any,
) -> PipelinePlan:
    """What `load_pipeline` would make of the same arguments, with nothing kept in memory and no network.

    The transformers are built on torch's meta device, where tensors have shapes and no bytes, and patched there as they
    would be for real; of the other parts what can be told without loading is checked. A base that may be a hub id is
    not looked up. Raises what `load_pipeline` raises.
    """
    from wan_runtime.api import load, patch

    found = prepare(
        checkpoint, checkpoint_low=checkpoint_low, base=base, text_encoder=text_encoder, vae=vae, device=device,
        dtype=dtype, look_up=False, **patch_options,
    )  # fmt: skip
    if found.base.index is not None:
        _scheduler(found.base)
    files = [file for file in (found.checkpoint, found.checkpoint_low) if file is not None]
    models = [load(file, device="meta", dtype=found.dtype, **found.options) for file in files]
    # patched already, by load: this only hands out its report
    return PipelinePlan(found.base, tuple(replace(patch(model), already=False) for model in models))


def _assemble(found: Prepared, parts: dict[str, Any]) -> Pipeline:
    import diffusers

    base, device = found.base.name, found.device
    encoder, tokenizer = _text(base, found.text_encoder, device, found.dtype)
    if parts["transformer"].config.image_dim is not None:
        parts = {**parts, **_image_encoder(base, device)}
    pipe: Pipeline = getattr(diffusers, found.kind)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(base, found.vae, device),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler(base: Base) -> Any:
    """The base's scheduler: a few numbers, and of no use to a model that would have to be loaded first."""
    import diffusers

    assert base.index is not None
    entry = base.index.get("scheduler")
    name = entry[-1] if isinstance(entry, list) and entry else None
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise InvalidOption(
            f"--base {base.name}: its model_index.json says scheduler: {entry!r}, and diffusers "
            f"{diffusers.__version__} has no scheduler of that name. Download the base again, or update diffusers."
        )
    return _part(cls, base.name, "scheduler")


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
