"""`--dry-run`: the plan of a start, without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import wan_runtime
from tests.builders import image_to_video
from tests.builders.wan import Sizes, hollow
from tests.serve.test_cli import invoke
from wan_runtime.bases import tiny_base, tiny_checkpoint

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
        "computing in float32",  # as it would be on this CPU
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


def of_seven_blocks(folder: Path) -> Path:
    """The tiny model with a block more, so that the bundled base is not taken for its own."""
    weights = load_file(tiny_checkpoint())
    last = {name.replace("blocks.5.", "blocks.6."): tensor.clone() for name, tensor in weights.items()}
    save_file({**weights, **last}, folder / "deeper.safetensors")
    return folder / "deeper.safetensors"


def starting_says(*options: str) -> str:
    """The words with which loading fails, as the worker of a real start loads."""
    arguments: dict[str, Any] = dict(
        zip((option.strip("-") for option in options[::2]), options[1::2], strict=True)
    )
    with pytest.raises(wan_runtime.WanRuntimeError) as refused:
        wan_runtime.load_pipeline(**arguments)
    return str(refused.value)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "no release of these sizes is known"),
        ("gone/folder/of/parts", "there is no such directory"),
        (".", "model_index.json"),
    ],
)
def test_a_base_that_is_missing_or_none_is_refused_in_the_words_of_the_start(
    tmp_path: Path, base: str | None, said: str
) -> None:
    options = ["--checkpoint", str(of_seven_blocks(tmp_path)), *(["--base", base] if base else [])]
    result = invoke("--dry-run", *options)
    assert (result.exit_code, said in result.output) == (1, True), result.output
    assert starting_says(*options) in result.output


def cut(base: Path, file: str) -> None:
    """As a download that was stopped leaves it."""
    whole = (base / file).read_bytes()
    (base / file).unlink()
    (base / file).write_bytes(whole[: len(whole) // 2])


def without_the_scheduler_s_name(base: Path) -> None:
    index = base / "model_index.json"
    fields = json.loads(index.read_text())
    del fields["scheduler"]
    index.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: shutil.rmtree(base / "vae"), "vae (there is no such folder)"),
        (
            lambda base: shutil.rmtree(base / "text_encoder"),
            "In place of text_encoder, --text-encoder serves too.",
        ),
        (lambda base: shutil.rmtree(base / "tokenizer"), "tokenizer (there is no such folder)"),
        (lambda base: shutil.rmtree(base / "scheduler"), "scheduler (there is no such folder)"),
        (
            lambda base: (base / "vae/diffusion_pytorch_model.safetensors").unlink(),
            "it has no diffusion_pytorch_model.safetensors or diffusion_pytorch_model.safetensors.index.json; it holds "
            "config.json",
        ),
        (lambda base: cut(base, "text_encoder/model.safetensors"), "the file is cut short"),
        (lambda base: cut(base, "vae/config.json"), "its config.json cannot be read"),
        (without_the_scheduler_s_name, "says scheduler: None"),
    ],
)
def test_a_base_that_lacks_a_part_is_refused_in_the_words_of_the_start(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    base = image_to_video.base(tmp_path / "base")
    result = invoke("--dry-run", "--base", str(base))
    assert result.exit_code == 0, result.output
    damage(base)
    result = invoke("--dry-run", "--base", str(base))
    assert (result.exit_code, said in result.output, str(base) in result.output) == (1, True, True), (
        result.output
    )
    assert starting_says("--base", str(base)) in result.output


def test_the_release_of_a_big_model_is_named_without_reading_it(tmp_path: Path) -> None:
    file = hollow(tmp_path / "big.safetensors", Sizes(dim=1536, ffn=8960, layers=30, text=4096, freq=256))
    result = invoke("--dry-run", "--checkpoint", str(file))
    assert (result.exit_code, "--base Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in result.output) == (1, True)


def test_a_hub_id_is_not_looked_up(tmp_path: Path) -> None:
    file = str(of_seven_blocks(tmp_path))
    result = invoke("--dry-run", "--checkpoint", file, "--base", "somebody/wan-of-seven-blocks")
    assert (result.exit_code, "somebody/wan-of-seven-blocks, not looked up" in result.output) == (0, True)
    result = invoke("--dry-run", "--checkpoint", file, "--base", str(tiny_base()))
    assert (result.exit_code, "not looked up" in result.output) == (0, False), result.output
