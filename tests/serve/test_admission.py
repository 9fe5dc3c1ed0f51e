"""What is refused before it costs anything: clips that are too much, and more of them than may wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serve.test_costs import CLIP, PROFILE, SPEED
from wan_runtime import Lora
from wan_runtime.serve.admission import add_job, terms_of
from wan_runtime.serve.costs import clip_seconds
from wan_runtime.serve.errors import ApiError
from wan_runtime.serve.memory import GIB, Memory
from wan_runtime.serve.services import Services, open_services
from wan_runtime.serve.settings import Settings
from wan_runtime.serve.state import Known

MODEL = "wan-tiny"
SECONDS = clip_seconds(SPEED, CLIP, PROFILE)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """The parts of a server whose worker is never started, but which has a warm one's measures."""
    settings = Settings(data_dir=tmp_path, max_queue_seconds=2.5 * SECONDS, max_job_seconds=1.5 * SECONDS)
    services = open_services(settings, lambda reason: None)
    services.engine.state = replace(
        services.engine.state, phase="ready", models={MODEL: Known(PROFILE, {}, SPEED)}
    )
    yield services
    services.close()


def test_a_clip_that_would_take_too_long_is_refused_with_the_numbers(services: Services) -> None:
    with pytest.raises(ApiError) as refused:
        terms_of(services, MODEL, replace(CLIP, num_inference_steps=100), None, None)
    assert (refused.value.status, refused.value.code) == (422, "clip_too_costly")
    assert "832x480 with 81 frames in 100 steps" in refused.value.message
    assert f"a clip may take {1.5 * SECONDS:.0f} s" in refused.value.message


def test_a_clip_that_would_not_fit_is_refused_and_loras_count(services: Services, tmp_path: Path) -> None:
    need = Memory(
        parts={"text": [0.0], "denoise": [0.0, 100.0], "chunk": [0.0, 0.0, 256.0]}, rest=GIB, room=9 * GIB
    )
    services.engine.state = replace(services.engine.state, models={MODEL: Known(PROFILE, {}, SPEED, need)})
    terms_of(services, MODEL, CLIP, None, None)  # 832 x 480 x 81 x 256 bytes are 7.7 GiB
    with pytest.raises(ApiError) as refused:
        terms_of(services, MODEL, replace(CLIP, num_frames=97), None, None)
    assert (refused.value.status, refused.value.code) == (422, "clip_too_large")
    assert "832x480 with 97 frames: that is predicted to take 9.24 GiB" in refused.value.message
    assert "there are 9.00 GiB. Up to 89 frames of this size fit." in refused.value.message
    file = tmp_path / "ink.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(GIB)
    loras = {"ink": Lora("ink", file, None)}
    with pytest.raises(ApiError, match=r"8\.71 GiB"):
        terms_of(services, MODEL, replace(CLIP, lora={"ink": 1.0}), None, None, loras=loras)


def test_an_operator_may_give_a_clip_less_than_there_is(services: Services) -> None:
    need = Memory(parts={"text": [0.0], "chunk": [0.0, 0.0, 256.0]}, rest=0, room=20 * GIB)
    services.engine.state = replace(services.engine.state, models={MODEL: Known(PROFILE, {}, SPEED, need)})
    terms_of(services, MODEL, CLIP, None, None)
    bounded = replace(services, settings=replace(services.settings, max_clip_gib=7.0))
    with pytest.raises(ApiError, match=r"there are 7\.00 GiB"):
        terms_of(bounded, MODEL, CLIP, None, None)


def test_a_full_queue_is_refused_with_a_time_that_the_client_waits(services: Services) -> None:
    terms = terms_of(services, MODEL, CLIP, None, None)
    assert terms.cost_seconds == pytest.approx(SECONDS)
    jobs = [add_job(services, MODEL, CLIP, None, terms) for _ in range(2)]
    with pytest.raises(ApiError) as refused:
        add_job(services, MODEL, CLIP, None, terms)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert "2 jobs are waiting" in refused.value.message
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 120  # the client honours no longer ones
    assert len(services.store.with_status("queued")) == 2
    services.store.delete(jobs[0].id, unless="in_progress")
    assert add_job(services, MODEL, CLIP, None, terms).status == "queued"


def test_a_queued_job_is_done_after_those_before_it(services: Services) -> None:
    terms = terms_of(services, MODEL, CLIP, None, None)
    first, second = (add_job(services, MODEL, CLIP, None, terms) for _ in range(2))
    eta = services.engine.forecast.eta
    assert eta(first) == pytest.approx(SECONDS)
    assert eta(second) == pytest.approx(2 * SECONDS)
    running = services.store.claim()
    assert running is not None
    services.store.progress(first.id, phase="denoise", step=25)
    half = services.store.get(first.id)
    assert half is not None
    assert SECONDS / 2 - 40 < (eta(half) or 0) < SECONDS / 2 + 40
    services.store.progress(first.id, phase="decode", step=50)
    assert eta(second) == pytest.approx(SECONDS + 832 * 480 * 81 * 1e-6)
    services.store.complete(first.id)
    ended = services.store.get(first.id)
    assert ended is not None and eta(ended) is None
