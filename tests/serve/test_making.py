"""One job in the worker, without the server: what a lack of memory becomes, and that the next clip is unharmed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import wan_runtime
from wan_runtime.serve.counters import SIZE, Counters
from wan_runtime.serve.making import Bench, Cancelled, explain, make
from wan_runtime.serve.previews import fit
from wan_runtime.serve.storage import Storage, new_id

HUGE = 2**60  # bytes, which no machine has
REQUEST: dict[str, Any] = {
    "width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 2, "fps": 8, "guidance_scale": 4.0, "seed": 1,
    "prompt": "a small red circle moving up on a black background",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return wan_runtime.load_pipeline()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path)
    storage.prepare()
    return storage


def bench(
    pipe: Any,
    storage: Storage,
    *,
    tell: Callable[..., None] = lambda *_, **__: None,
    check: Callable[[str], None] = lambda _: None,
) -> Bench:
    return Bench(pipe, storage, Counters([0] * SIZE), tell, check, fit(pipe))


def test_memory_that_runs_out_in_a_job_fails_it_with_advice_and_the_next_is_made(
    pipe: Any, storage: Storage
) -> None:
    def exhaust(event: str, **data: Any) -> None:
        if data.get("phase") == "decode":
            torch.empty(HUGE, dtype=torch.uint8)  # the allocator's own error, in the middle of a clip

    asked = asdict(wan_runtime.ClipRequest(**REQUEST))
    outcome = make(bench(pipe, storage, tell=exhaust), new_id(), asked, {})
    assert (outcome.event, outcome.data["code"]) == ("failed", "out_of_memory")
    assert "64x64 with 9 frames" in outcome.data["message"]
    assert "about 5 frames" in outcome.data["message"]
    assert list(storage.videos.iterdir()) == []
    done = make(bench(pipe, storage), new_id(), asked, {})
    assert done.event == "done" and done.data["size"] > 0
    assert sorted(path.suffix for path in storage.videos.iterdir()) == [".jpg", ".mp4", ".webp"]


def test_a_cancel_during_decoding_leaves_no_feature_maps(pipe: Any, storage: Storage) -> None:
    counters: list[Counters] = []

    def check(_: str) -> None:
        if counters and counters[0].read()["chunks"] == 2:
            raise Cancelled

    tools = bench(pipe, storage, check=check)
    counters.append(tools.counters)
    outcome = make(tools, new_id(), asdict(wan_runtime.ClipRequest(**REQUEST)), {})
    assert outcome.event == "cancelled"
    assert tools.counters.read() == {"steps": 2, "chunks": 2, "clips": 0}
    assert all(kept is None for kept in pipe.vae._feat_map)
    assert not pipe.vae.decoder._forward_pre_hooks
    assert list(storage.videos.iterdir()) == []


def test_the_beginning_of_the_first_step_is_told_once(pipe: Any, storage: Storage) -> None:
    told: list[tuple[str, int]] = []

    def tell(event: str, **data: Any) -> None:
        if event == "phase":
            told.append((data["phase"], data["step"]))
        if told[-1] == ("denoise", 0) and not begun:
            begun.append(tools.counters.read()["steps"])

    begun: list[int] = []
    tools = bench(pipe, storage, tell=tell)
    asked = asdict(wan_runtime.ClipRequest(**REQUEST))
    assert make(tools, new_id(), asked, {}).event == "done"
    assert told == [("text", 0), ("denoise", 0), ("denoise", 1), ("decode", 2), ("encode", 2)]
    assert begun == [0]
    assert not pipe.transformer._forward_pre_hooks


def test_what_a_client_may_know_of_an_error_is_told_and_no_more() -> None:
    """An unforeseen error names paths of the server (here) or lines of its code; the log has them."""
    failure = OSError(28, "No space left on device", "/srv/clips/videos/.x.part")
    code, message = explain(failure, REQUEST)
    assert code == "generation_failed" and "OSError" in message and "the server's log" in message
    assert "/srv" not in message and "space" not in message
    refusal = wan_runtime.InvalidRequest("flow_shift", "invalid_flow_shift", "It has none.")
    assert explain(refusal, REQUEST) == ("invalid_flow_shift", "It has none.")
