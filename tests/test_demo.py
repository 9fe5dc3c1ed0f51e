"""The demo does what the README promises, and says so when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from wan_runtime.tiny import checker


def demo(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "examples" / "demo.py"), *options]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_demo_makes_a_clip_that_shows_its_prompt(root: Path, tmp_path: Path) -> None:
    clip = tmp_path / "demo.mp4"
    done = demo(root, "--output", str(clip))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(clip)
    with av.open(str(clip)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    shown = checker.read(frames)
    assert (len(frames), shown.color, shown.shape, shown.motion) == (17, "orange", "circle", "moving right")


def test_a_prompt_that_the_checker_cannot_read_fails_at_once(root: Path, tmp_path: Path) -> None:
    done = demo(root, "--prompt", "a dog on a beach", "--output", str(tmp_path / "demo.mp4"))
    assert done.returncode == 1
    assert "The demo failed: 'a dog on a beach' is not a prompt of the tiny model" in " ".join(
        done.stderr.split()
    )
    assert list(tmp_path.iterdir()) == []
