"""What is known of a pipeline before a weight is loaded, and what it will accept: files' headers and small JSON.

Everything here is refused in a second or two: of a base in a folder nothing of diffusers is imported, which takes
longer than all the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_runtime.api import NAMING, options_of
from wan_runtime.asking import ClipProfile, profile_for
from wan_runtime.backends import device_named
from wan_runtime.base_parts import check_base
from wan_runtime.bases import Base, base_of, kind_of, tiny_checkpoint
from wan_runtime.checkpoint import Checkpoint
from wan_runtime.errors import InvalidOption
from wan_runtime.names import PATCH
from wan_runtime.parts import check_given
from wan_runtime.vaes import PUBLISHED, WAN21, latent_channels

if TYPE_CHECKING:
    import torch

SCALE = "scale_factor_spatial"  # in a VAE's configuration: pixels a latent, along a side


@dataclass(frozen=True)
class Prepared:
    """A pipeline's parts, looked at, and what they were given as: `checkpoint` to `options` are `load_pipeline`'s.

    kind  diffusers' class.
    """

    checkpoint: Path | str
    checkpoint_low: Path | str | None
    text_encoder: Path | str | None
    vae: Path | str | None
    options: Mapping[str, Any]
    transformer: Checkpoint
    base: Base
    kind: str
    boundary: float | None
    device: torch.device
    dtype: torch.dtype

    @property
    def expand_timesteps(self) -> bool:
        """Whether the model takes a timestep a token, which the base says."""
        return bool((self.base.index or {}).get("expand_timesteps", False))

    @property
    def profile(self) -> ClipProfile:
        """What `clip_profile` will say of the pipeline. Raises InvalidOption where the base's VAE cannot be asked."""
        variant = self.transformer.variant
        return profile_for(
            size_multiple=_scale(self.base, self.vae) * PATCH[1],
            in_channels=variant.in_channels,
            out_channels=variant.out_channels,
            text_dim=variant.text_dim,
            two_experts=self.boundary is not None,
            expand_timesteps=self.expand_timesteps,
        )


def prepare(
    checkpoint: Path | str | None = None,
    *,
    checkpoint_low: Path | str | None = None,
    base: Path | str | None = None,
    text_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    look_up: bool = True,
    **patch_options: Any,
) -> Prepared:
    """Look at the parts that `load_pipeline` is given, and refuse what can be refused without loading them.

    look_up: whether the hub may be asked for a base that is no directory. Raises as `load_pipeline` does.
    """
    import torch

    device = device_named(device)
    options_of(patch_options)
    naming = {name: patch_options[name] for name in NAMING if name in patch_options}
    checkpoint = checkpoint or tiny_checkpoint()
    opened = check_given(checkpoint, checkpoint_low, text_encoder, vae, naming)
    kind = kind_of(opened)
    found = base_of(opened, base, look_up=look_up)
    check_base(found, opened, text_encoder, vae)
    return Prepared(
        checkpoint=checkpoint,
        checkpoint_low=checkpoint_low,
        text_encoder=text_encoder,
        vae=vae,
        options=patch_options,
        transformer=opened,
        base=found,
        kind=kind,
        boundary=found.boundary(kind, checkpoint_low is not None),
        device=device,
        dtype=dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16),
    )


def _scale(base: Base, vae: Path | str | None) -> int:
    """Pixels a latent, along a side, of the VAE that `load_pipeline` would take."""
    if vae is None:
        return _of(_configuration(base))
    if Path(vae).is_dir():
        return _of(json.loads((Path(vae) / "config.json").read_text()))
    channels = latent_channels(vae)
    try:
        own = _configuration(base)
    except InvalidOption:
        own = {}  # the base need not have the part that this file takes the place of
    known = (own, *PUBLISHED) if own else PUBLISHED
    return _of(next((config for config in known if config.get("z_dim", 16) == channels), WAN21))


def _of(config: Mapping[str, Any]) -> int:
    return int(config.get(SCALE, 8))


def _configuration(base: Base) -> Mapping[str, Any]:
    """Of the base's VAE. Raises InvalidOption where it has none."""
    file = Path(base.name) / "vae" / "config.json"
    try:
        if Path(base.name).is_dir():
            return dict(json.loads(file.read_text()))
        from diffusers import AutoencoderKLWan

        return dict(AutoencoderKLWan.load_config(base.name, subfolder="vae"))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"No vae could be read from {base.name!r}: {error}") from error
