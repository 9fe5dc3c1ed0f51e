"""Start images and LoRAs on a GPU, whose blocks run fused: the clip is the image's, a LoRA leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from tests.builders import image_to_video
from tests.test_adapters import draw, original_names
from tests.test_image_to_video import ask, picture
from wan_runtime.bases import tiny_base, tiny_checkpoint
from wan_runtime.generating import generate
from wan_runtime.pipelines import load_pipeline

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("weights", ["keep", "fp8"])
@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_a_clip_starts_from_its_image(kind: str, weights: str, tmp_path: Path) -> None:
    checkpoint, base = image_to_video.wan22(tmp_path), tiny_base()
    if kind == "ti2v":
        checkpoint, base = tiny_checkpoint(), image_to_video.base(tmp_path / "base", expand_timesteps=True)
    options: dict[str, Any] = {} if weights == "keep" else {"weights": weights}
    on_gpu = load_pipeline(checkpoint, base=base, device="cuda", **options)
    on_cpu = load_pipeline(checkpoint, base=base, device="cpu")
    start = picture("orange")
    clips = [generate(pipe, ask(pipe, start), image=start).frames.astype(int) for pipe in (on_gpu, on_cpu)]
    assert np.abs(clips[0] - clips[1]).mean() < 12  # of 255: bf16 and FP8 against fp32, of two steps
    other = picture("blue")
    assert np.abs(generate(on_gpu, ask(on_gpu, other), image=other).frames.astype(int) - clips[0]).mean() > 3


@pytest.mark.parametrize("weights", ["keep", "fp8", "nvfp4"])
def test_a_lora_acts_and_leaves_nothing_behind(weights: str, tmp_path: Path) -> None:
    save_file(original_names(1), tmp_path / "film.safetensors")
    options: dict[str, Any] = {} if weights == "keep" else {"weights": weights}
    pipe = load_pipeline(device="cuda", **options)
    plain = draw(pipe, {}, tmp_path)
    assert np.abs(draw(pipe, {"film": 1.0}, tmp_path) - plain).mean() > 3
    assert np.array_equal(draw(pipe, {}, tmp_path), plain)
