"""Whether the files given for a pipeline's parts are what they are given as, and of one model, before any is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_runtime.base_parts import PARTS, problem
from wan_runtime.checkpoint import Checkpoint, open_checkpoint
from wan_runtime.containers import read_header
from wan_runtime.errors import CheckpointError, InvalidOption
from wan_runtime.experts import refuse_twins
from wan_runtime.names._parts import described, part_of
from wan_runtime.vaes import latent_channels

GIVEN = Path | str
CLASSES = {"text encoder": ("UMT5EncoderModel",), "VAE": ("AutoencoderKLWan",)}
FOLDERS = {"text encoder": "text_encoder", "VAE": "vae"}  # as a base calls them
OPTIONS = {"text encoder": "--text-encoder", "VAE": "--vae"}
VAES = {
    16: "the Wan2.1 VAE (of every model but TI2V-5B, A14B's too)",
    48: "the Wan2.2 VAE (of TI2V-5B alone)",
}


def check_given(
    checkpoint: GIVEN,
    checkpoint_low: GIVEN | None,
    text_encoder: GIVEN | None,
    vae: GIVEN | None,
    naming: Mapping[str, Any],
) -> Checkpoint:
    """Refuse parts given as one another, an expert given twice, and a VAE of another model; reads headers, and of two
    experts the small tensors that no producer quantises.

    naming: dialect and reference, as for `load`.

    Returns the transformer's checkpoint, opened.
    Raises InvalidOption, and CheckpointError and its subclasses for a file that cannot be read right.
    """
    _check_part("text encoder", text_encoder)
    _check_part("VAE", vae)
    opened = open_checkpoint(checkpoint, **naming)
    if checkpoint_low is not None:
        refuse_twins(opened, open_checkpoint(checkpoint_low, **naming))
    if vae is not None and Path(vae).is_file():
        _check_vae(opened, vae)
    return opened


def _check_part(part: str, given: GIVEN | None) -> None:
    """That what is given for a part is there, and is that part."""
    if given is None:
        return
    option, path = OPTIONS[part], Path(given)
    if path.is_file():
        try:
            entries = read_header(path).entries
        except CheckpointError as error:
            raise InvalidOption(f"{option} {given} cannot be read: {error}") from error
        found = part_of(entries)
        if found is None or found[0] != part:
            raise InvalidOption(f"{option} {given} is not a {part}; {described(entries)}")
    elif path.is_dir():
        _check_folder(part, option, path)
    else:
        raise InvalidOption(
            f"{option} {given} is not there. Give a .safetensors file or a diffusers directory of that part."
        )


def _check_folder(part: str, option: str, path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise InvalidOption(
            f"{option} {path} has no config.json, so it is no diffusers directory of a {part}."
        )
    try:
        fields = json.loads(config.read_text())
    except ValueError as error:
        raise InvalidOption(f"{option} {path}: its config.json is not valid JSON ({error}).") from error
    classes = [fields.get("_class_name"), *(fields.get("architectures") or ())]
    if not set(CLASSES[part]) & set(classes):
        held = ", ".join(str(name) for name in classes if name) or "nothing that says its class"
        raise InvalidOption(
            f"{option} {path} is not a {part}: its config.json says {held}; wanted {CLASSES[part][0]}."
        )
    why = problem(path, PARTS[FOLDERS[part]])
    if why is not None:
        raise InvalidOption(f"{option} {path} is not a whole {part}: {why}. Download it again.")


def _check_vae(transformer: Checkpoint, vae: GIVEN) -> None:
    """A transformer makes the latents that its VAE decodes: their channels must agree."""
    channels, wanted = latent_channels(vae), transformer.variant.out_channels
    if channels is not None and channels != wanted:
        raise InvalidOption(
            f"--vae {vae} has {channels} latent channels and is {VAES.get(channels, 'of an unknown model')}; "
            f"{transformer.path} is a {transformer.variant.name}, whose VAE has {wanted}"
            + (f": {VAES[wanted]}." if wanted in VAES else ".")
        )
