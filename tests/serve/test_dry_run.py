"""`--dry-run`: the plan of a start, without one."""

from __future__ import annotations

from pathlib import Path

import wan_runtime
from tests.serve.test_cli import invoke

TINY = "models/tiny/transformer/diffusion_pytorch_model.safetensors"


def test_the_plan_of_the_bundled_model_is_printed_and_nothing_is_opened(tmp_path: Path) -> None:
    result = invoke("--dry-run", "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 0, result.output
    for told in (
        "wan-tiny",
        "the bundled tiny model",
        "plain",
        "attention:",
        "parameters ",
        "127.0.0.1, port 8000",
    ):
        assert told in result.output
    assert not (tmp_path / "data").exists()


def test_the_plan_says_who_multiplies_what(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "nvfp4.safetensors"
    wan_runtime.convert(root / TINY, file, to="modelopt-nvfp4")
    result = invoke("--dry-run", "--checkpoint", str(file), "--compute", "bf16", "--backend", "torch")
    assert result.exit_code == 0, result.output
    for told in ("modelopt, nvfp4", "nvfp4   │ bf16        │ torch"):
        assert told in result.output


def test_the_choice_of_attention_reaches_the_model(tmp_path: Path) -> None:
    result = invoke("--dry-run", "--attention", "sdpa")
    assert (result.exit_code, "attention: sdpa" in result.output) == (0, True), result.output
    result = invoke("--dry-run", "--attention-end-steps", "2")
    assert (result.exit_code, "Ask for attention='fp8'" in " ".join(result.output.split())) == (1, True)


def test_what_could_not_be_served_is_said_with_the_status_1(tmp_path: Path) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    result = invoke("--dry-run", "--checkpoint", str(file))
    assert (result.exit_code, "could not serve this" in result.output) == (1, True), result.output
