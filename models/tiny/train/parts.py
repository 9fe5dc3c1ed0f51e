"""What a training run leaves behind, as at most eight files below 16 MiB each.

A machine that is lent for half an hour may send back a few small files and no folders, and is then gone: one run was
lost to an archive that was too large. So each stage's result is put down as soon as there is one, in its own file.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

LIMIT = 16 * 2**20
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
PACKED, WEIGHTS = "pipeline.tgz", "transformer.safetensors"
VAE, OPTIMISER = "vae_fp32.safetensors", "vae_optimiser.safetensors"


def put(source: Path, parts: Path | None, name: str | None = None) -> None:
    """Copies one file into `parts`, where there is one; raises ValueError if it is too large to come back."""
    if parts is None:
        return
    size = source.stat().st_size
    if size > LIMIT:
        raise ValueError(
            f"{source} has {size} bytes; a part may have {LIMIT}. Split it, or store it narrower."
        )
    parts.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, parts / (name or source.name))


def pack(pipeline: Path, parts: Path | None) -> None:
    """Puts a pipeline's folder into `parts` as two files: the transformer's weights, and all the rest."""
    if parts is None:
        return
    put(pipeline / TRANSFORMER, parts, WEIGHTS)
    archive = pipeline.parent / PACKED
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(pipeline.rglob("*")):
            name = file.relative_to(pipeline).as_posix()
            if file.is_file() and name != TRANSFORMER:
                tar.add(file, name)
    put(archive, parts)


def unpack(parts: Path, out: Path) -> None:
    """Lays what `pack` made out as a pipeline's folder; files of that name in `out` are replaced."""
    for needed in (PACKED, WEIGHTS):
        if not (parts / needed).is_file():
            raise FileNotFoundError(
                f"{parts} has no {needed}: the run ended before its transformer was saved."
            )
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(parts / PACKED) as tar:
        tar.extractall(out, filter="data")
    (out / TRANSFORMER).parent.mkdir(exist_ok=True)
    shutil.copyfile(parts / WEIGHTS, out / TRANSFORMER)


def restore(parts: Path, out: Path) -> None:
    """Lays the parts out as the folder of the run that left them, to go on from; without a pipeline if it had none."""
    weights = out / "state" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(parts / VAE, weights)
    shutil.copyfile(parts / OPTIMISER, out / "state" / OPTIMISER)
    if (parts / PACKED).is_file():
        unpack(parts, out / "pipeline")
