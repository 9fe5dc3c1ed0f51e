"""The videos API, spoken by the real `openai` client to a real server with a real (tiny) model."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from openai.types import Video
from PIL import Image

from tests.serve.conftest import QUICK, Server, same_clip, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
LONG = {**QUICK, "num_inference_steps": 200}
PROMPT = "a large red circle moving right on a black background"


def frames_of(data: bytes) -> list[np.ndarray[Any, Any]]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def whole_of(client: openai.OpenAI, video: Video) -> np.ndarray[Any, Any]:
    return np.stack(frames_of(client.videos.download_content(video.id).content)).astype(np.int16)


@pytest.fixture(scope="module")
def finished(server: Server) -> Video:
    """A clip that the client created and polled to its end."""
    with server.client() as client:
        return client.videos.create_and_poll(prompt=PROMPT, extra_body={**QUICK, "seed": 7, "fps": 4})


def test_create_and_poll_ends_with_a_completed_video(finished: Video) -> None:
    assert (finished.status, finished.progress, finished.error) == ("completed", 100, None)
    assert (finished.object, finished.model, finished.prompt) == ("video", "wan-tiny", PROMPT)
    assert (finished.size, finished.seconds) == ("64x64", "1.25")  # 5 frames at 4 a second
    assert finished.completed_at is not None and finished.completed_at >= finished.created_at
    assert finished.model_extra is not None
    assert finished.model_extra["seed"] == 7
    assert finished.model_extra["num_inference_steps"] == 2


def test_the_content_is_the_clip_that_was_asked_for(
    client: openai.OpenAI, finished: Video, tmp_path: Path
) -> None:
    answer = client.videos.download_content(finished.id)
    assert answer.response.headers["content-type"] == "video/mp4"
    path = tmp_path / "clip.mp4"
    answer.write_to_file(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 64)
        assert (stream.frames, stream.average_rate) == (5, 4)


def test_the_content_is_served_in_ranges(server: Server, client: openai.OpenAI, finished: Video) -> None:
    whole = client.videos.download_content(finished.id).content
    part = httpx.get(f"{server.url}/v1/videos/{finished.id}/content", headers={"range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, whole[4:12])
    assert whole[4:8] == b"ftyp"


def test_the_seed_decides_the_frames(client: openai.OpenAI, finished: Video) -> None:
    clips = {}
    for seed in (7, 8):
        video = client.videos.create_and_poll(prompt=PROMPT, extra_body={**QUICK, "seed": seed, "fps": 4})
        clips[seed] = whole_of(client, video)
    assert same_clip(clips[7], whole_of(client, finished))
    assert not same_clip(clips[8], clips[7])


def test_without_a_seed_one_is_drawn_and_told(client: openai.OpenAI) -> None:
    videos = [client.videos.create(prompt=PROMPT, extra_body=QUICK) for _ in range(2)]
    seeds = [(video.model_extra or {})["seed"] for video in videos]
    assert seeds[0] != seeds[1]
    for video in videos:
        client.videos.delete(video.id)


def test_progress_counts_denoising_steps(client: openai.OpenAI) -> None:
    steps = 30
    video = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": steps})
    seen = []
    while video.status in ("queued", "in_progress"):
        video = client.videos.retrieve(video.id)
        seen.append((video.progress, (video.model_extra or {})["step"]))
    assert video.status == "completed"
    assert seen == sorted(seen)
    assert len({progress for progress, _ in seen if 0 < progress < 99}) >= 5
    assert all(progress == min(99, 100 * step // steps) for progress, step in seen[:-1])


def test_seconds_become_frames_and_are_told_as_they_came_out(client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, seconds="4", size="64x64")  # type: ignore[arg-type]
    assert (video.model_extra or {})["num_frames"] == 33  # 4 s at 8 a second, snapped to 4n+1
    assert video.seconds == "4.125"
    client.videos.delete(video.id)


def test_the_defaults_are_the_tiny_models(client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT)
    extra = video.model_extra or {}
    assert str(video.size) == "128x128"
    assert [extra[name] for name in ("num_frames", "fps", "num_inference_steps", "guidance_scale")] == [
        17,
        8,
        20,
        3,
    ]
    client.videos.delete(video.id)


def test_a_json_body_is_read_too(server: Server, client: openai.OpenAI) -> None:
    body = {"prompt": PROMPT, "seed": 3, "negative_prompt": None, **QUICK}
    answer = httpx.post(f"{server.url}/v1/videos", json=body)
    assert answer.status_code == 200
    assert (answer.json()["seed"], answer.json()["negative_prompt"]) == (3, "")
    client.videos.delete(answer.json()["id"])


def test_polling_is_paced_by_the_server(server: Server, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body=LONG)
    answer = server.get(f"/v1/videos/{video.id}")
    assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    client.videos.delete(video.id)


def test_the_list_is_paged_both_ways(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=f"{PROMPT} {n}", extra_body=LONG).id for n in range(5)]
    newest = client.videos.list(limit=2)
    assert [video.id for video in newest.data] == made[:2:-1]
    assert newest.has_more and newest.last_id == made[3]
    everything = [video.id for video in client.videos.list(limit=2)]  # the client walks the pages
    assert everything[:5] == made[::-1]
    assert len(everything) == len(set(everything))
    assert [video.id for video in client.videos.list(limit=100, order="asc")] == everything[::-1]
    for one in reversed(made):
        client.videos.delete(one)


def test_the_queue_runs_in_order_and_says_how_long_it_is(client: openai.OpenAI) -> None:
    first, second, third = [client.videos.create(prompt=PROMPT, extra_body=LONG).id for _ in range(3)]
    wait_for(lambda: client.videos.retrieve(first).status == "in_progress", "the first job to run")
    places = [
        (client.videos.retrieve(one).model_extra or {})["queue_position"] for one in (first, second, third)
    ]
    assert places == [None, 0, 1]
    for one in (third, second, first):
        client.videos.delete(one)


def test_deleting_a_queued_job_removes_it(client: openai.OpenAI) -> None:
    running = client.videos.create(prompt=PROMPT, extra_body=LONG)
    queued = client.videos.create(prompt=PROMPT, extra_body=LONG)
    gone = client.videos.delete(queued.id)
    assert (gone.id, gone.deleted, gone.object) == (queued.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(queued.id)
    client.videos.delete(running.id)


def test_deleting_a_running_job_stops_it_and_the_next_one_runs(client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body=LONG)
    wait_for(lambda: (client.videos.retrieve(video.id).model_extra or {})["step"] > 0, "a first step")
    assert client.videos.delete(video.id).deleted
    after = client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
    assert after.status == "completed"


def test_deleting_a_finished_job_removes_its_file(server: Server, client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
    path = server.data_dir / "videos" / f"{video.id}.mp4"
    assert path.is_file()
    client.videos.delete(video.id)
    assert not path.exists()
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.download_content(video.id)
    assert refused.value.code == "video_not_found"


def test_content_of_an_unfinished_job_is_refused_once_and_not_retried(client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body=LONG)
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.download_content(video.id)
    assert (refused.value.code, refused.value.type) == ("video_not_ready", "invalid_request_error")
    assert refused.value.response.headers["x-should-retry"] == "false"
    client.videos.delete(video.id)


def test_a_thumbnail_and_a_spritesheet_show_the_clip(client: openai.OpenAI, finished: Video) -> None:
    frames = frames_of(client.videos.download_content(finished.id).content)
    pictures = {}
    for variant, kind in (("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")):
        answer = client.videos.download_content(finished.id, variant=variant)  # type: ignore[arg-type]
        assert answer.response.headers["content-type"] == kind
        pictures[variant] = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), np.float32)
    assert pictures["thumbnail"].shape == (64, 64, 3)
    assert (
        np.abs(pictures["thumbnail"] - frames[2]).mean() < 12
    )  # the middle one of five, both coded with losses
    sheet = pictures["spritesheet"]
    assert sheet.shape == (128, 192, 3)  # three in a row
    assert np.abs(sheet[64:, 64:128] - frames[4]).mean() < 12
    assert np.abs(sheet[64:, 128:]).mean() < 1  # nothing in the sixth place


def test_another_variant_is_refused_with_those_that_exist(client: openai.OpenAI, finished: Video) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.download_content(finished.id, variant="poster")  # type: ignore[arg-type]
    assert refused.value.code == "unsupported_variant"
    assert "video, thumbnail, spritesheet, start_image" in refused.value.message
    with pytest.raises(openai.BadRequestError) as none:
        client.videos.download_content(finished.id, variant="start_image")  # type: ignore[arg-type]
    assert none.value.code == "unsupported_variant" and "did not start from an image" in none.value.message


def test_what_decided_the_clip_is_told_and_in_the_file(client: openai.OpenAI, finished: Video) -> None:
    made_with = (finished.model_extra or {})["made_with"]
    assert (made_with["model"], made_with["dialect"], made_with["quantised_layers"]) == (
        "wan-tiny",
        "plain",
        [],
    )
    assert {"wan_runtime", "torch", "diffusers"} == set(made_with["versions"])
    with av.open(io.BytesIO(client.videos.download_content(finished.id).content)) as container:
        inside = json.loads(container.metadata["comment"])
    asked = inside.pop("request")
    assert inside == made_with
    assert (asked["prompt"], asked["seed"], asked["num_inference_steps"]) == (PROMPT, 7, 2)


def test_a_repeated_create_with_the_same_key_is_the_same_job(client: openai.OpenAI) -> None:
    def create(**fields: Any) -> Video:
        return client.videos.create(
            prompt=PROMPT, extra_body={**LONG, **fields}, extra_headers={"Idempotency-Key": "order-7"}
        )

    first = create()
    assert create().id == first.id
    assert (create().model_extra or {})["seed"] == (first.model_extra or {})["seed"]  # drawn once
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        create(seed=8)
    assert refused.value.code == "idempotency_key_reused"
    client.videos.delete(first.id)
    again = create(seed=8)  # the key goes with its job
    assert again.id != first.id
    client.videos.delete(again.id)


def test_concurrent_creates_with_one_key_make_one_job(server: Server, client: openai.OpenAI) -> None:
    async def many() -> set[str]:
        async with server.aclient() as aclient:
            made = await asyncio.gather(
                *(
                    aclient.videos.create(
                        prompt=PROMPT, extra_body=LONG, extra_headers={"Idempotency-Key": "at-once"}
                    )
                    for _ in range(8)
                )
            )
            return {video.id for video in made}

    [only] = asyncio.run(many())
    client.videos.delete(only)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_a_bad_idempotency_key_is_refused(server: Server, key: str) -> None:
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": PROMPT}, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_idempotency_key")


def test_an_eta_falls_while_a_job_runs_and_ends_with_it(client: openai.OpenAI) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": 60})
    waiting = client.videos.create(prompt=PROMPT, extra_body=QUICK)

    def eta(one: str) -> float:
        told = (client.videos.retrieve(one).model_extra or {})["eta_seconds"]
        return float(told) if told is not None else 0.0

    first = eta(video.id)
    assert 0 < first < eta(waiting.id)
    wait_for(lambda: eta(video.id) < first / 2, "half of it to be done")
    assert (client.videos.poll(video.id).model_extra or {})["eta_seconds"] is None
    client.videos.poll(waiting.id)


REFUSED: dict[str, tuple[dict[str, Any], int, str, str, str]] = {
    "empty prompt": ({"prompt": "  "}, 422, "invalid_prompt", "prompt", "empty"),
    "long prompt": ({"prompt": "x" * 5000}, 422, "invalid_prompt", "prompt", "5000"),
    "size off the grid": ({"size": "100x128"}, 422, "invalid_size", "size", "96 or 112"),
    "size is no size": ({"size": "big"}, 422, "invalid_size", "size", "WIDTHxHEIGHT"),
    "size too large": ({"size": "1280x720"}, 422, "invalid_size", "size", "921600"),
    "width alone": ({"width": 64}, 422, "invalid_size", "size", "together"),
    "sizes disagree": ({"size": "64x64", "width": 128, "height": 64}, 422, "conflicting_parameters", "size", "128"),
    "frames": ({"num_frames": 16}, 422, "invalid_num_frames", "num_frames", "13 or 17"),
    "too many frames": ({"num_frames": 4001}, 422, "invalid_num_frames", "num_frames", "4001"),
    "seconds": ({"seconds": "soon"}, 422, "invalid_seconds", "seconds", "soon"),
    "seconds and frames": (
        {"seconds": "4", "num_frames": 17}, 422, "conflicting_parameters", "num_frames", "33 frames"
    ),
    "no steps": ({"num_inference_steps": 0}, 422, "invalid_num_inference_steps", "num_inference_steps", "1 to 200"),
    "many steps": ({"num_inference_steps": 201}, 422, "invalid_num_inference_steps", "num_inference_steps", "201"),
    "negative seed": ({"seed": -1}, 422, "invalid_seed", "seed", "-1"),
    "nan guidance": ({"guidance_scale": "nan"}, 422, "invalid_guidance_scale", "guidance_scale", "nan"),
    "second expert": ({"guidance_scale_2": 3}, 422, "invalid_guidance_scale_2", "guidance_scale_2", "two experts"),
    "no fps": ({"fps": 0}, 422, "invalid_fps", "fps", "1 to 60"),
    "zero shift": ({"flow_shift": 0}, 422, "invalid_flow_shift", "flow_shift", "0.01"),
    "unknown field": ({"steps": 8}, 400, "unknown_parameter", "steps", "num_inference_steps"),
    "other model": ({"model": "sora-2"}, 404, "model_not_found", "model", "wan-tiny"),
    "image by address": (
        {"input_reference": {"image_url": "http://127.0.0.1/x.png"}},
        422, "input_reference_unsupported", "input_reference", "text-to-video",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_made_is_refused_with_a_code_and_the_numbers(client: openai.OpenAI, what: str) -> None:
    fields, status, code, param, said = REFUSED[what]
    with pytest.raises(openai.APIStatusError) as refused:
        client.videos.create(prompt=fields.get("prompt", PROMPT), extra_body=fields)
    error = refused.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.type == "invalid_request_error"
    assert said in error.message
    assert error.request_id is not None and error.request_id.startswith("req_")


def test_a_start_image_as_a_file_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.videos.create(prompt=PROMPT, input_reference=("../../x.png", b"\x89PNG" * 1000, "image/png"))
    assert refused.value.code == "input_reference_unsupported"


def test_refusals_leave_no_job_behind(client: openai.OpenAI) -> None:
    before = [video.id for video in client.videos.list()]
    with pytest.raises(openai.UnprocessableEntityError):
        client.videos.create(prompt=PROMPT, extra_body={"num_frames": 16})
    assert [video.id for video in client.videos.list()] == before


@pytest.mark.parametrize(
    "video_id", ["video_" + "0" * 32, "nope", "..%2F..%2Fjobs.sqlite3", "video_" + "0" * 31 + "G"]
)
@pytest.mark.parametrize("call", ["retrieve", "delete", "download_content"])
def test_an_unknown_id_is_not_found(client: openai.OpenAI, call: str, video_id: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        getattr(client.videos, call)(video_id)
    assert refused.value.type == "invalid_request_error"
    assert refused.value.code in ("video_not_found", "unknown_url")  # %2F is a slash to the router


def test_an_unknown_cursor_and_a_bad_limit_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.videos.list(after="video_" + "0" * 32)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.videos.list(limit=1000)
    assert (refused.value.code, refused.value.param) == ("invalid_limit", "limit")


@pytest.mark.parametrize("name", ["per_page", "Limit", "x" * 200])
def test_an_unknown_parameter_of_the_list_is_refused_not_dropped(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.list(limit=1, extra_query={name: "5"})
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", name[:80])
    assert "after, limit, order" in refused.value.message


def test_the_async_client_does_it_all(server: Server) -> None:
    async def everything() -> tuple[str, int, list[str], bool]:
        async with server.aclient() as client:
            video = await client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
            content = await (await client.videos.download_content(video.id)).aread()
            listed = [one.id async for one in client.videos.list(limit=1)]
            assert video.id in listed
            gone = await client.videos.delete(video.id)
            return video.status, len(frames_of(content)), listed, gone.deleted

    status, frames, listed, deleted = asyncio.run(everything())
    assert (status, frames, deleted) == ("completed", 5, True)
    assert listed
