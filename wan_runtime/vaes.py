"""The VAE as a single file: Wan2.1's or Wan2.2's (of TI2V-5B), under the original release's names or diffusers'.

A file holds no configuration, and above all not the mean and spread of the latents, without which every clip has wrong
colours. They come from the base's own configuration where the file fits it, else from the two published models.
Sources of the names and of the published values: diffusers, scripts/convert_wan_to_diffusers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan_runtime.containers import read_header
from wan_runtime.errors import BadTensor, CheckpointError, UnaccountedTensors
from wan_runtime.header import Header
from wan_runtime.names import Spelling, from_original
from wan_runtime.names._parts import described, part_of
from wan_runtime.swap import set_parameter

FLOAT = ("F32", "BF16", "F16")
PREFIXES = ("vae.", "first_stage_model.")
WAN21: Mapping[str, Any] = {}  # the class's own defaults
WAN22: Mapping[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}  # fmt: skip
PUBLISHED = (WAN21, WAN22)
_RESIDUAL = {  # a residual block is a list in the original
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def load_vae(path: Path | str, device: torch.device, base: Mapping[str, Any] | None = None) -> Any:
    """diffusers' AutoencoderKLWan with the file's weights, in fp32.

    base  the configuration of the VAE that the file takes the place of, tried first.

    Raises CheckpointError when the file is another kind of model or fits no known VAE, BadTensor for a quantised or a
    damaged tensor; a VAE is not quantised.
    """
    header = read_header(path)
    part = part_of(header.entries)
    if part is None or part[0] != "VAE":
        raise CheckpointError(header.path, f"this is not a VAE; {described(header.entries)}")
    _check_floats(header)
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in header.entries)), "")
    original = "original" in part[1]
    tried = []
    for config in (*([base] if base else []), *PUBLISHED):
        model = _built(config)
        names = names_of(model.config) if original else None
        keys = {_renamed(key.removeprefix(prefix), names): key for key in header.entries}
        wrong = _unfit(model, header, keys)
        if not wrong:
            return _filled(model, header, keys).to(device).eval().requires_grad_(False)
        tried.append(wrong)
    fewest = min(tried, key=len)
    raise UnaccountedTensors(
        header.path,
        unconsumed=fewest,
        hint=f"It is {part[1]}, and of no size that is known: not the base's, nor one of the two published. Give a "
        "diffusers folder of it, whose config.json says its sizes and the mean and spread of its latents.",
    )


def latent_channels(path: Path | str) -> int | None:
    """How many channels a VAE file's latents have, from its header; None when it says nothing of it."""
    header = read_header(path)
    for key in ("conv2.weight", "post_quant_conv.weight"):
        for prefix in ("", *PREFIXES):
            entry = header.entries.get(prefix + key)
            if entry is not None and len(entry.shape) == 5:
                return entry.shape[0]
    return None


def names_of(config: Any) -> Spelling:
    """diffusers' names of a VAE's modules in terms of the original release's, which count what diffusers nests."""
    top = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for side in ("encoder", "decoder"):
        top |= {
            f"{side}.conv_in": f"{side}.conv1",
            f"{side}.norm_out": f"{side}.head.0",
            f"{side}.conv_out": f"{side}.head.2",
            f"{side}.mid_block.attentions.0": f"{side}.middle.1",
            **_block(f"{side}.mid_block.resnets.0", f"{side}.middle.0"),
            **_block(f"{side}.mid_block.resnets.1", f"{side}.middle.2"),
        }
    stages, blocks = len(config.dim_mult), config.num_res_blocks
    for stage in range(stages):
        last = stage == stages - 1
        top |= (_nested if config.is_residual else _flat)(stage, blocks, last)
    return Spelling(name="diffusers", marks=(), top=top, block={})


def _block(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{place}" for name, place in _RESIDUAL.items()}


def _flat(stage: int, blocks: int, last: bool) -> dict[str, str]:
    """Wan2.1: one list a side; diffusers groups the decoder's by stage. The encoder's has one block fewer a stage."""
    rows: dict[str, str] = {}
    first = stage * (blocks + 1)
    for n in range(first, first + blocks):
        rows |= _block(f"encoder.down_blocks.{n}", f"encoder.downsamples.{n}")
    if not last:
        rows[f"encoder.down_blocks.{first + blocks}"] = f"encoder.downsamples.{first + blocks}"
    first = stage * (blocks + 2)
    for n in range(blocks + 1):
        rows |= _block(f"decoder.up_blocks.{stage}.resnets.{n}", f"decoder.upsamples.{first + n}")
    if not last:
        rows[f"decoder.up_blocks.{stage}.upsamplers.0"] = f"decoder.upsamples.{first + blocks + 1}"
    return rows


def _nested(stage: int, blocks: int, last: bool) -> dict[str, str]:
    """Wan2.2: a list of lists, the resampling last in each."""
    rows: dict[str, str] = {}
    for ours, theirs, count, sampler in (
        (f"encoder.down_blocks.{stage}", f"encoder.downsamples.{stage}.downsamples", blocks, "downsampler"),
        (f"decoder.up_blocks.{stage}", f"decoder.upsamples.{stage}.upsamples", blocks + 1, "upsampler"),
    ):
        for n in range(count):
            rows |= _block(f"{ours}.resnets.{n}", f"{theirs}.{n}")
        if not last:
            rows[f"{ours}.{sampler}"] = f"{theirs}.{count}"
    return rows


def _check_floats(header: Header) -> None:
    for key, entry in header.entries.items():
        if entry.dtype not in FLOAT:
            raise BadTensor(
                header.path,
                key,
                f"it is {entry.dtype}. A VAE is small and what it rounds shows in every clip: give one in F32, BF16 "
                "or F16.",
            )


def _renamed(key: str, names: Spelling | None) -> str:
    return key if names is None else from_original(names, key)


def _built(config: Mapping[str, Any]) -> Any:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan

    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        return AutoencoderKLWan.from_config(dict(config)) if config else AutoencoderKLWan()


def _unfit(model: nn.Module, header: Header, keys: Mapping[str, str]) -> list[str]:
    """Keys of the file and slots of the model that do not go together."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: header.entries[key].shape for name, key in keys.items()}
    names = sorted(wanted.keys() ^ given.keys())
    return names or [keys[name] for name in wanted if wanted[name] != given[name]]


def _filled(model: nn.Module, header: Header, keys: Mapping[str, str]) -> nn.Module:
    with header.opened() as read:
        for name, key in keys.items():
            tensor = read(key).float()
            if not bool(torch.isfinite(tensor).all()):
                raise BadTensor(header.path, key, "it holds NaN or infinite values; the file is damaged.")
            module, _, leaf = name.rpartition(".")
            set_parameter(model.get_submodule(module), leaf, tensor.clone())
    return model
