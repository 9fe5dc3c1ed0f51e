"""A clip's memory: predictions for sizes that nobody has counted, and a server that refuses what would not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch.autograd import profiler_util
from torch.profiler import ProfilerActivity, profile

import wan_runtime
from tests.serve.conftest import QUICK, Server, running
from tests.serve.test_cli import invoke
from tests.serve.test_metrics import values
from tests.weighed import Size, clip, learned
from wan_runtime.serve.costs import tokens_of
from wan_runtime.serve.memory import GIB, Memory, by_phase, clip_bytes, refusal
from wan_runtime.serve.weighing import TOKENS, clips_to_decode, clips_to_pass

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
CLOSE = 0.03
LIMIT = 0.1  # GiB: of the tiny model 64x64 fits, and 128x128 with more than a frame does not


@pytest.fixture(scope="module")
def pipe() -> Any:
    return wan_runtime.load_pipeline(device="cpu")


@pytest.fixture(scope="module")
def memory(pipe: Any) -> Memory:
    return learned(pipe, steps=1)


def peak(pipe: Any, size: Size) -> int:
    """The most that torch's CPU allocator held beyond what it held before, in its own running total."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        wan_runtime.generate(pipe, clip(pipe, size, 1))
    seen: list[tuple[int, int, int]] = []  # when, the total after it, and by how much that changed
    waiting = list(session.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == profiler_util.MEMORY_EVENT_NAME:
            fields = event.extra_fields
            seen.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    _, total, change = min(seen)
    return max(total for _, total, _ in seen) - (total - change)


@pytest.mark.long
@pytest.mark.parametrize("size", [(64, 64, 33), (128, 128, 13)])
def test_sizes_that_were_not_counted_take_what_is_predicted(pipe: Any, memory: Memory, size: Size) -> None:
    # twice to six times the pixels of the largest clip that was decoded to learn from
    assert clip_bytes(memory, clip(pipe, size)) == pytest.approx(peak(pipe, size), rel=CLOSE)


def test_the_clips_that_are_learned_from_are_small_and_tell_their_terms_apart() -> None:
    large = wan_runtime.ClipProfile(
        size_multiple=16, max_pixels=1920 * 1088, max_frames=257, two_experts=True, width=1280, height=720,
        num_frames=81, fps=16, num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0,
    )  # fmt: skip
    practice = large.request("warm-up", seed=0)
    few, many = (tokens_of(one, 16) for one in clips_to_pass(practice, large))
    assert 1024 < few < many < 2 * TOKENS
    decoded = [(one.width, one.height, one.num_frames) for one in clips_to_decode(practice, large)]
    assert decoded == [(640, 352, 9), (640, 176, 9), (640, 176, 17)]
    coarse = replace(large, size_multiple=32, width=128, height=128)
    areas = {one.width * one.height for one in clips_to_decode(practice, coarse)}
    assert areas == {128 * 128, 128 * 64}


def known() -> Memory:
    """A model whose clips take 1 MiB a frame of 64x64."""
    return Memory(parts={"text": [2.0**20], "denoise": [0.0, 1.0], "chunk": [0.0, 0.0, 2.0**8]}, rest=0)


def test_what_would_not_fit_is_told_with_the_numbers_and_what_would(pipe: Any) -> None:
    asked = clip(pipe, (64, 64, 33))
    assert by_phase(known(), asked) == {"text": 2**20, "denoise": 64 * 64 * 9, "decode": 33 * 2**20}
    assert refusal(known(), asked, 16, 33 * 1.06 * 2**20) is None
    reason = refusal(known(), asked, 16, 33 * 1.04 * 2**20)
    assert reason is not None and "64x64 with 33 frames" in reason
    assert "0.03 GiB beside the weights (text 0.00, denoise 0.00, decode 0.03)" in reason
    assert reason.endswith("Up to 29 frames of this size fit.")
    one = refusal(known(), replace(asked, num_frames=1), 16, 0.3 * 2**20)
    assert one is not None and one.endswith("Nothing of these proportions fits.")  # a text alone is too much
    wide = refusal(known(), clip(pipe, (256, 256, 1)), 16, 4.3 * 2**20)
    assert wide is not None and wide.endswith("one frame of this size would not fit; 128x128 with 1 would.")
    loras = refusal(known(), asked, 16, 33 * 1.06 * 2**20, beside=10 * 2**20)
    assert loras is not None and loras.endswith("Up to 21 frames of this size fit.")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that gives a clip little memory, by its file."""
    folder = tmp_path_factory.mktemp("memory")
    config = folder / "wan.toml"
    config.write_text(f"max-clip-gib = {LIMIT}\nmetrics = true\nlog-format = 'json'\n")
    with running(folder / "data", "--config", str(config)) as server:
        server.wait_ready()
        yield server


@pytest.mark.long
def test_a_server_refuses_what_would_not_fit_and_makes_what_does(bounded: Server) -> None:
    large = {**QUICK, "prompt": "a red circle", "width": 128, "height": 128, "num_frames": 33}
    refused = httpx.post(f"{bounded.url}/v1/videos", json=large, timeout=30)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, "clip_too_large"), error
    assert "128x128 with 33 frames" in error["message"] and f"{LIMIT:.2f} GiB" in error["message"]
    fitting = re.search(r"(\d+)x(\d+) with 33 would", error["message"])
    assert fitting is not None, error
    width, height = map(int, fitting.groups())
    with bounded.client() as client:
        asked = {**large, "width": width, "height": height}
        video = client.videos.create_and_poll(prompt=str(asked.pop("prompt")), extra_body=asked)
    assert video.status == "completed", video.error
    predicted = values(bounded, "wan_clip_memory_predicted_bytes")[()]
    assert 0.7 * LIMIT * GIB < predicted <= LIMIT * GIB
    assert bounded.get("/v1/models/wan-tiny").json()["memory"] == {"rest": 0, "room": None}


@pytest.mark.long
def test_nothing_but_json_is_logged_while_memory_is_counted(bounded: Server) -> None:
    lines = [json.loads(line) for line in bounded.log.read_text().splitlines()]
    assert any("is ready" in line["message"] or "ready: " in line["message"] for line in lines)


def test_no_memory_is_looked_at_where_the_operator_says_so(tmp_path: Path) -> None:
    off = invoke("--dry-run", "--no-check-memory", "--data-dir", str(tmp_path))
    assert "memory of a clip  not looked at" in off.output, off.output
    both = invoke("--dry-run", "--no-check-memory", "--max-clip-gib", "4", "--data-dir", str(tmp_path))
    assert (both.exit_code, "would not heed it" in both.output) == (2, True), both.output
