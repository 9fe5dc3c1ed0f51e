"""Options become settings, and settings become arguments of the runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_runtime.serve.settings import Settings, is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.4", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_only_this_machines_own_addresses_are_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        (None, "wan-tiny"),
        (Path("/models/wan2.1-t2v-14b-nvfp4.safetensors"), "wan2.1-t2v-14b-nvfp4"),
        (Path("/models/Wan2.1-T2V/transformer/diffusion_pytorch_model.safetensors"), "Wan2.1-T2V"),
        (Path("/models/mine/diffusion_pytorch_model.safetensors"), "mine"),
        (
            Path("/models/Wan2.1-T2V/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"),
            "Wan2.1-T2V",
        ),
        (Path("/models/Wan2.1-T2V/transformer/diffusion_pytorch_model.safetensors.index.json"), "Wan2.1-T2V"),
        (Path("/models/Wan2.2-T2V/high_noise_model"), "Wan2.2-T2V"),
        (Path("/models/Wan2.1-T2V"), "Wan2.1-T2V"),
        (Path("/models/blocks/non_block.safetensors"), "blocks"),
        (Path("/models/wan.Q4_K_M.gguf"), "wan.Q4_K_M"),
    ],
)
def test_the_model_is_named_after_its_file(checkpoint: Path | None, name: str) -> None:
    assert Settings(checkpoint=checkpoint).model_name == name


def test_only_what_was_decided_reaches_the_runtime() -> None:
    assert Settings().pipeline_options() == {}
    given = Settings(checkpoint=Path("a"), base="hub/id", compute="bf16", dialect="modelopt_nvfp4")
    assert given.pipeline_options() == {
        "checkpoint": Path("a"),
        "base": "hub/id",
        "compute": "bf16",
        "dialect": "modelopt_nvfp4",
    }
    fp8 = Settings(attention="fp8", attention_end_blocks=0, attention_end_steps=3)
    assert fp8.pipeline_options() == {
        "attention": "fp8",
        "attention_end_blocks": 0,
        "attention_end_steps": 3,
    }
