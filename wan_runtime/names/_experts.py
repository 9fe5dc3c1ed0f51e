"""What folders and files are called that hold one expert of Wan2.2's two."""

from __future__ import annotations

import re
from pathlib import Path

NOISE = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)  # how published files of one expert are named


def noise_in(path: Path) -> str | None:
    """Either "high" or "low", as the file's name says, or else its folder's; None where neither does, or one says both.

    diffusers' `transformer` folder is the high-noise expert's where `transformer_2`, the low-noise one's, is beside it.
    """
    for name in (path.name, path.parent.name):
        said = {match.lower() for match in NOISE.findall(name)}
        if len(said) == 1:
            return "high" if "high" in said else "low"
    if path.parent.name == "transformer_2":
        return "low"
    if path.parent.name == "transformer" and (path.parent.parent / "transformer_2").is_dir():
        return "high"
    return None
