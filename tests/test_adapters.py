"""LoRAs by name, in clips: diffusers' and PEFT's, beside quantised weights, and gone after the clip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from tests.test_cli import quick
from wan_runtime.adapters import list_loras, lora_digests
from wan_runtime.asking import ClipRequest
from wan_runtime.bases import tiny_checkpoint
from wan_runtime.errors import InvalidOption, InvalidRequest
from wan_runtime.generating import clip_profile, generate
from wan_runtime.names import SPELLINGS, to_original
from wan_runtime.pipelines import load_pipeline

PROMPT = "a large red circle moving right on a black background"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
MODULES = ("blocks.0.attn1.to_q", "blocks.3.attn2.to_v", "blocks.5.ffn.net.0.proj")
State = dict[str, torch.Tensor]


def deltas(seed: int = 0) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Module, A and B, strong enough to show."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(tiny_checkpoint())
    for name in MODULES:
        out, inner = weights[f"{name}.weight"].shape
        down, up = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((4, inner), (out, 4)))
        yield name, down, up


def diffusers_names(seed: int = 0) -> State:
    return {
        f"transformer.{name}.lora_{which}.weight": tensor
        for name, a, b in deltas(seed)
        for which, tensor in (("A", a), ("B", b))
    }


def original_names(seed: int = 0) -> State:
    """As ComfyUI and most trainers write them."""
    state: State = {}
    for name, a, b in deltas(seed):
        path = to_original(SPELLINGS["diffusers"], f"{name}.weight").removesuffix(".weight")
        state |= {f"diffusion_model.{path}.lora_A.weight": a, f"diffusion_model.{path}.lora_B.weight": b}
    return state


def merged(folder: Path, *strengths: tuple[int, float]) -> Path:
    """The oracle: the tiny model with W + strength x B A in its file."""
    weights = load_file(tiny_checkpoint())
    for seed, strength in strengths:
        for name, a, b in deltas(seed):
            weights[f"{name}.weight"] = weights[f"{name}.weight"].float() + strength * (b @ a)
    path = folder / "merged.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(diffusers_names(), folder / "Ink wash v1.5.safetensors")
    save_file(original_names(1), folder / "film.safetensors")
    (folder / "notes.txt").write_text("not one")
    (folder / "old.pt").write_bytes(b"\x80\x04.")
    return folder


def draw(pipe: Any, lora: Mapping[str, float], folder: Path) -> Any:
    request = clip_profile(pipe).request(PROMPT, **SMALL, lora=lora or None)
    return generate(pipe, request, loras=list_loras(folder)).frames.astype(int)


def test_a_folders_loras_are_its_safetensors_files(folder: Path) -> None:
    (folder / "deeper").mkdir()
    save_file(diffusers_names(), folder / "deeper" / "hidden.safetensors")
    assert list(list_loras(folder)) == ["Ink wash v1.5", "film"]
    with pytest.raises(InvalidOption, match="cannot be read"):
        list_loras(folder / "gone")


def test_two_files_of_one_name_but_for_the_expert_are_one_lora(tmp_path: Path) -> None:
    names = ("style_high_noise", "style_low_noise", "both", "half-HighNoise", "high_noise", "low_noise",
             "odd_low_noise", "odd_high_noise", "odd")  # fmt: skip
    for name in names:
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    found = {
        name: tuple(path and path.stem for path in (lora.high, lora.low))
        for name, lora in list_loras(tmp_path).items()
    }
    assert found == {
        "style": ("style_high_noise", "style_low_noise"), "both": ("both", "both"), "odd": ("odd", "odd"),
        "half-HighNoise": ("half-HighNoise", None), "high_noise": ("high_noise", None),
        "low_noise": (None, "low_noise"), "odd_low_noise": (None, "odd_low_noise"),
        "odd_high_noise": ("odd_high_noise", None),
    }  # fmt: skip


@pytest.mark.parametrize(
    "lora", [{"Ink wash v1.5": 1.0}, {"film": -0.5}, {"Ink wash v1.5": 0.5, "film": 1.0}]
)
def test_a_clip_with_loras_is_that_of_the_merged_weights(
    lora: dict[str, float], pipe: Any, folder: Path
) -> None:
    plain = draw(pipe, {}, folder)
    made = draw(pipe, lora, folder)
    seeds = {"Ink wash v1.5": 0, "film": 1}
    truth = load_pipeline(merged(folder, *((seeds[name], s) for name, s in lora.items())), device="cpu")
    assert np.abs(made - draw(truth, {}, folder)).max() <= 2
    assert np.abs(made - plain).max() > 20, "the LoRA is too weak to show"
    assert not any(isinstance(module, LoraLayer) for module in pipe.transformer.modules())
    assert np.array_equal(draw(pipe, {}, folder), plain)


def test_a_lora_goes_beside_quantised_weights(folder: Path) -> None:
    pipe = load_pipeline(device="cpu", weights="fp8", backend="reference")
    keys = list(pipe.transformer.state_dict())
    plain = draw(pipe, {}, folder)
    assert np.abs(draw(pipe, {"film": 1.0}, folder) - plain).max() > 20
    assert list(pipe.transformer.state_dict()) == keys
    assert np.array_equal(draw(pipe, {}, folder), plain)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    weights = load_file(tiny_checkpoint())
    weights["scale_shift_table"] = weights["scale_shift_table"] * 1.1
    low = tmp_path_factory.mktemp("two") / "wan_low_noise.safetensors"
    save_file(weights, low)
    return load_pipeline(tiny_checkpoint(), checkpoint_low=low, device="cpu")


def test_of_two_experts_each_gets_its_own(two: Any, folder: Path) -> None:
    save_file(diffusers_names(), folder / "pair_high_noise.safetensors")
    save_file(original_names(1), folder / "pair_low_noise.safetensors")
    save_file(original_names(2), folder / "alone_low_noise.safetensors")
    held: dict[str, list[list[str]]] = {}
    for name in ("pair", "film", "alone_low_noise"):
        held[name] = []

        def look(*_: object, name: str = name) -> None:
            held[name] = [list(getattr(m, "peft_config", {})) for m in (two.transformer, two.transformer_2)]

        request = clip_profile(two).request(PROMPT, **SMALL, lora={name: 1.0})
        generate(two, request, look, loras=list_loras(folder))
    assert held == {"pair": [["lora_0"]] * 2, "film": [["lora_0"]] * 2, "alone_low_noise": [[], ["lora_0"]]}
    assert [getattr(m, "peft_config", {}) for m in (two.transformer, two.transformer_2)] == [{}, {}]


def test_a_lora_of_two_experts_is_refused_for_a_model_with_one(pipe: Any, folder: Path) -> None:
    save_file(original_names(), folder / "half_low_noise.safetensors")
    with pytest.raises(InvalidRequest, match="one expert of a model with two") as refused:
        draw(pipe, {"half_low_noise": 1.0}, folder)
    assert (refused.value.param, refused.value.code) == ("lora", "lora_unusable")


def broken(state: State) -> dict[str, State]:
    """States that are no LoRA for this model, by what is wrong."""
    first = next(iter(state))
    up = first.replace("lora_A", "lora_B")
    return {
        "nothing": {},
        "other names": {f"unet.{key}": tensor for key, tensor in state.items()},
        "another module": state | {key.replace("blocks.0", "blocks.40"): state[key].clone() for key in (first, up)},
        "another width": {key: torch.cat([t, t], 1) if "lora_A" in key else t for key, t in state.items()},
        "half a layer": {key: t for key, t in state.items() if key != up},
        "NaN": {**state, first: state[first] * float("nan")},
        "integers": {**state, first: state[first].to(torch.int8)},
        "a DoRA": {**state, "transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(4)},
        "a norm": {**original_names(), "diffusion_model.blocks.0.norm3.diff": torch.ones(256)},
        "a stray tensor": {**state, "transformer.blocks.0.extra": torch.ones(4)},
        "a whole model": {key: t for key, t in load_file(tiny_checkpoint()).items() if "proj_out" in key},
    }  # fmt: skip


@pytest.mark.parametrize("what", broken(diffusers_names()))
def test_a_file_that_would_not_be_used_whole_is_refused(what: str, pipe: Any, folder: Path) -> None:
    save_file(broken(diffusers_names())[what], folder / "broken.safetensors")
    plain = draw(pipe, {}, folder)
    with pytest.raises(InvalidRequest, match="'broken' cannot be used") as refused:
        draw(pipe, {"broken": 1.0}, folder)
    assert refused.value.code == "lora_unusable" and str(folder) not in str(refused.value)
    assert np.array_equal(draw(pipe, {}, folder), plain)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"\x80\x04K\x01."])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, pipe: Any, folder: Path) -> None:
    (folder / "broken.safetensors").write_bytes(content)
    with pytest.raises(InvalidRequest, match="cannot be read") as refused:
        draw(pipe, {"broken": 1.0}, folder)
    assert refused.value.code == "lora_unusable"


@pytest.mark.parametrize("name", ["gone", "../loras/film", "film.safetensors", "old", "/etc/passwd", ""])
def test_a_name_is_one_of_the_list_and_no_path(name: str, pipe: Any, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="no LoRA named") as refused:
        draw(pipe, {name: 1.0}, folder)
    assert refused.value.code == "lora_not_found"


@pytest.mark.parametrize("lora", [{"a": float("nan")}, {"a": 4.5}, {"a": -5}, dict.fromkeys("abcde", 1.0)])
def test_strengths_and_numbers_are_bounded(lora: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ClipRequest(
            prompt="x", width=64, height=64, num_frames=5, fps=8, num_inference_steps=1, guidance_scale=1, seed=0,
            lora=lora,
        )  # fmt: skip
    assert (refused.value.param, refused.value.code) == ("lora", "invalid_lora")


def test_a_digest_is_that_of_the_file_as_it_is_now(folder: Path) -> None:
    import hashlib

    def digest() -> list[str]:
        return lora_digests(list_loras(folder)["film"])

    before = digest()
    assert before == [hashlib.sha256((folder / "film.safetensors").read_bytes()).hexdigest()]
    save_file(original_names(7), folder / "film.safetensors")
    assert digest() != before


def test_the_command_takes_loras_by_name(folder: Path, tmp_path: Path) -> None:
    common = ["generate", "--prompt", PROMPT, "--size", "64x64", "--frames", "5", "--steps", "1", "--device", "cpu",
              "--output", str(tmp_path / "clip.mp4")]  # fmt: skip
    status, _, said = quick(
        *common, "--lora-dir", str(folder), "--lora", "film=0.5", "--lora", "Ink wash v1.5"
    )
    assert status == 0, said
    for given, why in (
        (["--lora", "film"], "--lora-dir"),
        (["--lora-dir", str(folder), "--lora", "gone"], "Ink wash v1.5, film"),
        (["--lora-dir", str(folder), "--lora", "film=much"], "not a number"),
        (["--lora-dir", str(folder), "--lora", "film", "--lora", "film=2"], "twice"),
        (["--lora-dir", str(folder), "--lora", "film=9"], "from -4 to 4"),
    ):
        status, _, said = quick(*common, *given)
        assert status == 2 and why in said
