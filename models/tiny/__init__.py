"""The bundled tiny Wan pipeline: data that travels in the wheel as `wan_runtime.tiny`.

It is a real diffusers pipeline folder (transformer, VAE, text encoder, tokenizer, scheduler), trained on
moving coloured shapes and small enough to generate a clip on a CPU. README.md beside this file says how it
was trained and how often its clips show what their prompt says.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The pipeline's folder, in a checkout and in an installed wheel alike."""
    return Path(__file__).resolve().parent
