"""Server-sent events: every step in order, once each, also over a lost connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import QUICK, Server
from tests.serve.test_admission import MODEL, services
from tests.serve.test_costs import CLIP
from wan_runtime.serve.admission import add_job, terms_of
from wan_runtime.serve.endpoints import events as endpoint
from wan_runtime.serve.services import Services

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a large white circle moving left on a red background"
STEPS = 12
__all__ = ["services"]  # a fixture


@dataclass(frozen=True)
class Told:
    number: str
    name: str
    data: dict[str, Any]


def events(server: Server, video: str, last: str | None = None) -> Iterator[Told]:
    headers = {"Last-Event-ID": last} if last else {}
    url = f"{server.url}/v1/videos/{video}/events"
    with httpx.stream("GET", url, headers=headers, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                yield Told(fields["id"], fields["event"], json.loads(fields["data"]))
                fields = {}


def test_a_job_is_told_from_its_place_in_the_queue_to_its_end(server: Server, client: openai.OpenAI) -> None:
    first = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": 40})
    video = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": STEPS})
    told = list(events(server, video.id))
    previews = [event for event in told if event.name == "preview"]
    told = [event for event in told if event.name != "preview"]
    assert previews and all(
        event.data["image"].startswith("data:image/jpeg;base64,/9j/") for event in previews
    )
    assert (told[0].name, told[0].data["queue_position"]) == ("queued", 0)
    assert told[0].data["eta_seconds"] > 0
    names = [event.name for event in told if event.name != "queued"]
    assert names == ["text", *["step"] * STEPS, "decode", "encode", "done"]
    steps = [event.data["step"] for event in told if event.name == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert all(event.data["steps"] == STEPS for event in told)
    assert (told[-1].data["status"], told[-1].data["progress"]) == ("completed", 100)
    for one in (first, video):
        client.videos.delete(one.id)


def test_a_reader_that_lost_its_connection_misses_nothing(server: Server, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": STEPS})
    told: list[Told] = []
    last = None
    for _ in range(100):
        for event in events(server, video.id, last):
            told.append(event)
            last = event.number
            if event.name == "step" and event.data["step"] % 3 == 0:
                break  # the connection is lost
        if told[-1].name == "done":
            break
    steps = [event.data["step"] for event in told if event.name == "step"]
    assert steps == list(range(1, STEPS + 1))
    numbers = [int(event.number.partition("-")[2]) for event in told]
    assert numbers == sorted(set(numbers))
    answer = httpx.get(
        f"{server.url}/v1/videos/{video.id}/events", headers={"Last-Event-ID": told[-1].number}
    )
    assert (answer.status_code, answer.content) == (204, b"")
    client.videos.delete(video.id)


@pytest.mark.parametrize("last", ["", "nonsense", "00000000-5", "00000000-" + "9" * 400])
def test_an_id_of_another_life_starts_from_where_the_job_stands(
    server: Server, client: openai.OpenAI, last: str
) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
    [only] = events(server, video.id, last)
    assert (only.name, only.data["status"]) == ("done", "completed")
    client.videos.delete(video.id)


def test_an_id_that_is_yet_to_come_is_not_waited_for(server: Server, client: openai.OpenAI) -> None:
    """No event would ever come after it: the stream would outlive its job, for as long as the client likes."""
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
    [only] = events(server, video.id)
    epoch = only.number.partition("-")[0]
    [again] = events(server, video.id, f"{epoch}-{10**14}")
    assert (again.name, again.data["status"]) == ("done", "completed")
    client.videos.delete(video.id)


@pytest.mark.parametrize("end", ["failed", "deleted"])
def test_a_stream_ends_with_its_job_though_its_last_event_was_dropped(
    services: Services, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Events of the latest jobs are kept, and a reader that is slow may find its own gone."""
    monkeypatch.setattr(endpoint, "QUIET_SECONDS", 0.05)
    terms = terms_of(services, MODEL, CLIP, None, None)
    job = add_job(services, MODEL, CLIP, None, terms)

    async def read() -> list[str]:
        told = []
        async for text in endpoint._stream(services, job, None):
            told.append(text)
            if len(told) == 3:
                if end == "failed":
                    services.store.fail(job.id, "cancelled", "It was.", status="queued")
                else:
                    services.store.delete(job.id, unless="in_progress")
        return told

    first, *quiet = asyncio.run(asyncio.wait_for(read(), 30))
    assert "event: queued" in first and set(quiet[:2]) == {": still here\n\n"}
    assert ("event: failed" in quiet[-1]) == (end == "failed") and len(quiet) < 6


def test_a_cancel_and_a_delete_end_the_stream(server: Server, client: openai.OpenAI) -> None:
    for call, name in (("cancel", "failed"), ("delete", "failed")):
        video = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": 200})
        told = []
        for event in events(server, video.id):
            told.append(event)
            if event.name == "step" and event.data["step"] == 1:
                if call == "cancel":
                    httpx.post(f"{server.url}/v1/videos/{video.id}/cancel", timeout=60)
                else:
                    client.videos.delete(video.id)
        assert told[-1].name == name
        assert told[-1].data["error"]["code"] == "cancelled"
    client.videos.delete(client.videos.list(limit=1).data[0].id)


def test_there_are_no_events_of_an_unknown_job(server: Server) -> None:
    answer = server.get(f"/v1/videos/video_{'0' * 32}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
