"""Whole models on Transformer Engine's products: against torch's, offloaded, and in the tiny model's clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from tests.gpu.test_offload_gpu import ENABLE, WHOLE_BLOCKS
from tests.hosts.diffusers import error, inputs, latents, pipeline, transformer
from wan_runtime.bases import tiny_base
from wan_runtime.errors import BackendUnavailable
from wan_runtime.linear import quantised_layers
from wan_runtime.pipelines import load_pipeline
from wan_runtime.tiny import checker, drawing, variants
from wan_runtime.tiny.drawing import Ask

pytestmark = [pytest.mark.gpu, pytest.mark.te]

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The tiny model's trained weights in FP8 with one scale a tensor, or one a channel."""
    folder = tmp_path_factory.mktemp("made")

    def made(per_channel: bool) -> Path:
        path = folder / f"{per_channel}.safetensors"
        if not path.exists():
            wan_runtime.convert(variants.SOURCE, path, to="comfy-fp8-scaled", per_channel=per_channel)
        return path

    return made


@pytest.mark.parametrize("fuse", [True, False])
def test_a_patched_model_is_as_near_to_bf16_as_torchs(fuse: bool) -> None:
    results = {}
    for backend in ("none", "te", "torch"):
        model = transformer(BF16).requires_grad_(False)
        if backend != "none":
            report = wan_runtime.patch(model, backend=backend, weights="fp8", fuse=fuse)
            assert {d.backend for d in report.quantised} == {backend}
            counts = {made.get_parameter("scale").numel() for _, made in quantised_layers(model)}
            assert (counts == {1}) == (backend == "te")
        results[backend] = latents(pipeline(model).to("cuda"), steps=3)
    wrong = {name: error(results[name], results["none"]) for name in ("te", "torch")}
    print(f"latents from bf16's, fuse={fuse}: {wrong}")
    assert wrong["te"] < 1.5 * wrong["torch"] + 0.01


# Inductor imports what torch itself has deprecated, and its tracer makes an instance of FlashAttention's function.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("fuse", [True, False])
def test_blocks_compile_whole_and_say_the_same(fuse: bool) -> None:
    torch._dynamo.reset()
    model = transformer(BF16).to("cuda").requires_grad_(False)
    wan_runtime.patch(model, backend="te", weights="fp8", fuse=fuse)
    given = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs(BF16).items()}
    with torch.no_grad():
        expected = model(**given)[0]
        model.compile_repeated_blocks(fullgraph=True)
        assert error(model(**given)[0], expected) < 0.02
    torch._dynamo.reset()


def test_the_tiny_models_clips_are_what_was_asked(files: Callable[[bool], Path]) -> None:
    asks = [
        Ask("a large red circle moving right on a white background", 7),
        Ask("a large yellow square moving up on a navy background", 7),
    ]
    pipe = load_pipeline(files(False), base=tiny_base(), device="cuda", backend="te")
    assert {made.backend for _, made in quantised_layers(pipe.transformer)} == {"te"}
    clips = drawing.draw(pipe, asks, 8)
    assert [checker.wrong(clip, ask.prompt) for clip, ask in zip(clips, asks, strict=True)] == [(), ()]


def test_a_file_with_a_scale_a_channel_is_refused_and_requantised_only_if_asked(
    files: Callable[[bool], Path],
) -> None:
    with pytest.raises(BackendUnavailable, match="one an output channel"):
        wan_runtime.load(files(True), device="cuda", backend="te")
    model = wan_runtime.load(files(True), device="cuda", backend="te", weights="fp8")
    assert {made.get_parameter("scale").numel() for _, made in quantised_layers(model)} == {1}


@pytest.mark.parametrize("how", ENABLE)
def test_offloaded_output_is_the_resident_output(how: str, files: Callable[[bool], Path]) -> None:
    def patched(fuse: bool) -> Any:
        model = transformer(BF16).requires_grad_(False)
        wan_runtime.patch(model, backend="te", fuse=fuse)
        return model

    before = latents(pipeline(patched(how in WHOLE_BLOCKS)).to("cuda"), steps=3)
    pipe = pipeline(patched(True))
    ENABLE[how](pipe)
    for _ in range(2):
        assert error(latents(pipe, steps=3), before) < 1e-6
        pipe.maybe_free_model_hooks()
        left = "meta" if how == "sequential" else "cpu"
        kinds = {made.get_parameter("payload").device.type for _, made in quantised_layers(pipe.transformer)}
        assert kinds == {left}, "the bytes stayed on the GPU"
