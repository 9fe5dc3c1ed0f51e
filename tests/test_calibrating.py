"""Calibration: what is recorded, against hooks of the test's own on the stock model; from prompts to a static file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import wan_runtime
from tests.builders import wan
from wan_runtime.bases import tiny_base, tiny_checkpoint
from wan_runtime.calibrating import read_prompts, recorded
from wan_runtime.cli import app
from wan_runtime.errors import InvalidOption, WanRuntimeError

PROMPTS = ("a large red circle moving right on a black background", "a small blue square")
REQUEST = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 2}
PAIRS = {f"blocks.{n}.{theirs}": f"blocks.{n}.{ours}" for n in range(6) for ours, theirs in wan.BLOCK_LINEARS}


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    """Amax of each Linear's input in stock diffusers, over the same clips."""
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(tiny_base(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    amax: dict[str, float] = {}
    for path, module in pipe.transformer.named_modules():
        if path in PAIRS:

            def record(_: Any, inputs: Any, path: str = path) -> None:
                amax[PAIRS[path]] = max(amax.get(PAIRS[path], 0.0), float(inputs[0].abs().max()))

            module.register_forward_pre_hook(record)
    for seed, prompt in enumerate(PROMPTS):
        pipe(
            prompt=prompt, negative_prompt="", width=64, height=32, num_frames=5, num_inference_steps=2,
            guidance_scale=3.0, generator=torch.Generator().manual_seed(seed), output_type="latent",
        )  # fmt: skip
    return amax


def test_the_recorded_amax_is_the_stock_models(truth: dict[str, float]) -> None:
    seen = []
    found = wan_runtime.calibrate(
        tiny_checkpoint(),
        PROMPTS,
        request=REQUEST,
        device="cpu",
        on_step=lambda done, total: seen.append((done, total)),
    )
    assert found.keys() == truth.keys() and len(truth) == 60
    for path, value in truth.items():
        assert found[path] == pytest.approx(value, rel=1e-4), path
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_convert_calibrates_from_a_file_of_prompts_and_static_scales_are_then_used(
    tmp_path: Path, truth: dict[str, float]
) -> None:
    prompts, new = tmp_path / "prompts.txt", tmp_path / "static.safetensors"
    prompts.write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]}  \n", encoding="utf-8")
    arguments = (
        "convert", tiny_checkpoint(), new, "--to", "modelopt-fp8", "--calibrate", prompts, "--size", "64x32",
        "--frames", 5, "--steps", 2, "--device", "cpu",
    )  # fmt: skip
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    written = load_file(new)
    for theirs, ours in PAIRS.items():
        assert float(written[f"{theirs}.input_scale"]) == pytest.approx(truth[ours] / 448, rel=1e-4)
    model = wan_runtime.load(new, device="cpu", dtype=torch.float32, activation="static")
    plain = wan_runtime.load(tiny_checkpoint(), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 8, generator=generator),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 8, 128, generator=generator),
    }
    with torch.no_grad():
        quantised, exact = model(**inputs).sample, plain(**inputs).sample
    assert 1e-4 < (quantised - exact).norm() / exact.norm() < 0.1


def test_a_layer_without_input_or_with_an_infinite_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_runtime import calibrating

    monkeypatch.setattr(calibrating, "generate", lambda *_: None)  # a run that reaches no layer
    with pytest.raises(WanRuntimeError, match="60 of 60 layers had no input"):
        wan_runtime.calibrate(tiny_checkpoint(), PROMPTS, request=REQUEST, device="cpu")
    monkeypatch.undo()
    model = wan_runtime.load(tiny_checkpoint(), device="cpu", dtype=torch.float32)
    with recorded(model) as amax:
        linear = model.get_submodule("blocks.2.attn1.to_q")
        for value in (1.0, float("nan"), 2.0):
            linear(torch.full((1, 256), value))
    assert torch.isnan(amax["blocks.2.self_attn.q"])
    with recorded(model) as later:
        pass
    assert float(later["blocks.2.self_attn.q"]) == 0
    model.get_submodule("blocks.2.attn1.to_q")(torch.ones(1, 256))
    assert float(later["blocks.2.self_attn.q"]) == 0  # the hooks are gone


def test_what_no_calibration_can_start_from_is_refused(tmp_path: Path) -> None:
    file = tiny_checkpoint()
    with pytest.raises(InvalidOption, match="at least one prompt"):
        wan_runtime.calibrate(file, ())
    with pytest.raises(InvalidOption, match="not both"):
        wan_runtime.calibrate(file, PROMPTS, checkpoint_low=file, checkpoint_high=file)
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(InvalidOption, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("bad.txt", "none.txt"):
        with pytest.raises(InvalidOption, match="cannot be read"):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "option", ["--base", "--checkpoint-low", "--checkpoint-high", "--size", "--frames", "--steps"]
)
def test_options_of_a_calibration_mean_nothing_without_one(tmp_path: Path, option: str) -> None:
    arguments = [
        "convert",
        str(tiny_checkpoint()),
        str(tmp_path / "new.safetensors"),
        "--to",
        "comfy-fp8",
        option,
        "5",
    ]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert f"{option}: only with --calibrate" in done.stderr


def test_two_experts_are_recorded_each_for_itself(tmp_path: Path) -> None:
    """A pipeline whose low-noise expert has other weights: each expert's own inputs are recorded."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base, ignore=shutil.ignore_patterns("train", "*.py"))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.9}))
    other = {key: tensor * 1.25 for key, tensor in load_file(tiny_checkpoint()).items()}
    save_file(other, tmp_path / "low.safetensors")
    options: dict[str, Any] = {
        "request": {**REQUEST, "num_inference_steps": 4},
        "base": base,
        "device": "cpu",
    }
    high = wan_runtime.calibrate(
        tiny_checkpoint(), PROMPTS[:1], checkpoint_low=tmp_path / "low.safetensors", **options
    )
    low = wan_runtime.calibrate(
        tmp_path / "low.safetensors", PROMPTS[:1], checkpoint_high=tiny_checkpoint(), **options
    )
    assert high.keys() == low.keys() and len(high) == 60
    assert all(low[path] != value for path, value in high.items())
