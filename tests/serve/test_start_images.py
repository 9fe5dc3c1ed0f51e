"""Start images through the real `openai` client: two servers, one of a model that needs an image and one that may."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from openai.types import Video
from PIL import Image

from tests.builders import image_to_video
from tests.serve.conftest import QUICK, Server, running, same_clip, wait_for
from tests.test_starting import REFUSED as BAD_IMAGES
from wan_runtime.bases import tiny_base, tiny_checkpoint
from wan_runtime.starting import MAX_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a large red circle moving right on a black background"
JPEG = "image/jpeg"


def photograph(colour: str = "orange", size: tuple[int, int] = (120, 64)) -> bytes:
    """A JPEG that says where it was taken."""
    exif = Image.Exif()
    exif[0x010E] = "the photographer's house"
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG", exif=exif, quality=95)
    return out.getvalue()


PHOTO = photograph()
DIGEST = hashlib.sha256(PHOTO).hexdigest()
DATA_URL = f"data:{JPEG};base64,{base64.b64encode(PHOTO).decode()}"


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """TI2V, as Wan2.2's 5B: a clip may start from an image. It fetches from hosts that resolve to nothing public."""
    folder = tmp_path_factory.mktemp("ti2v")
    base = image_to_video.base(folder / "base", expand_timesteps=True)
    hosts = [part for host in ("localhost", "127.0.0.1") for part in ("--allow-image-host", host)]
    with running(
        folder / "data", "--checkpoint", str(tiny_checkpoint()), "--base", str(base), *hosts
    ) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """I2V, as Wan2.2's experts: every clip starts from an image."""
    folder = tmp_path_factory.mktemp("i2v")
    checkpoint = image_to_video.wan22(folder)
    with running(folder / "data", "--checkpoint", str(checkpoint), "--base", str(tiny_base())) as server:
        server.wait_ready()
        yield server


def frames_of(client: openai.OpenAI, video: Video) -> Any:
    assert video.status == "completed", video.error
    content = client.videos.download_content(video.id).content
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def extra(video: Video, name: str) -> Any:
    return (video.model_extra or {})[name]


def kept(server: Server) -> list[Path]:
    return sorted((server.data_dir / "inputs").iterdir())


def test_a_clip_begins_with_the_image_that_was_uploaded(ti2v: Server) -> None:
    with ti2v.client() as client:
        asked = {**QUICK, "seed": 3}
        video = client.videos.create_and_poll(
            prompt=PROMPT, input_reference=("../../x.jpg", PHOTO, JPEG), extra_body=asked
        )
        first = frames_of(client, video)[0]
        assert np.abs(first - np.asarray(Image.new("RGB", (64, 64), "orange"), int)).mean() < 12
        assert extra(video, "image") == DIGEST
        without = client.videos.create_and_poll(prompt=PROMPT, extra_body=asked)
        assert extra(without, "image") is None
        assert np.abs(frames_of(client, without)[0] - first).mean() > 12
        [picture] = kept(ti2v)
        assert picture.name == f"{video.id}.png" and picture.stat().st_mode & 0o077 == 0
        assert b"photographer" not in picture.read_bytes()  # pixels alone
        content = client.videos.download_content(video.id).content
        with av.open(io.BytesIO(content)) as container:
            assert json.loads(container.metadata["comment"])["request"]["image"] == DIGEST
        client.videos.delete(video.id)
        client.videos.delete(without.id)
        assert kept(ti2v) == []


def test_each_way_to_send_it_gives_the_same_clip(i2v: Server) -> None:
    asked = {**QUICK, "seed": 3}
    with i2v.client() as client:
        uploaded = client.videos.create_and_poll(
            prompt=PROMPT, input_reference=("x", PHOTO, "text/plain"), extra_body=asked
        )
        bracketed = client.videos.create_and_poll(
            prompt=PROMPT, extra_body={**asked, "input_reference": {"image_url": DATA_URL}}
        )
        ids = [
            httpx.post(f"{i2v.url}/v1/videos", json={"prompt": PROMPT, **asked, "input_reference": way}).json()["id"]
            for way in ({"image_url": DATA_URL}, DATA_URL)
        ]  # fmt: skip
        clips = [frames_of(client, video) for video in (uploaded, bracketed, *map(client.videos.poll, ids))]
        assert all(same_clip(clip, clips[0]) for clip in clips[1:])
        other = client.videos.create_and_poll(
            prompt=PROMPT, input_reference=("x.jpg", photograph("blue"), JPEG), extra_body=asked
        )
        assert np.abs(frames_of(client, other) - clips[0]).mean() > 3


def test_a_model_that_needs_an_image_says_so_and_refuses_its_absence(i2v: Server, ti2v: Server) -> None:
    takes = {
        server: server.get("/v1/models").json()["data"][0]["limits_and_defaults"]["takes_image"]
        for server in (i2v, ti2v)
    }
    assert takes == {i2v: "required", ti2v: "optional"}
    with i2v.client() as client, pytest.raises(openai.UnprocessableEntityError) as refused:
        client.videos.create(prompt=PROMPT, extra_body=QUICK)
    assert (refused.value.code, refused.value.param) == ("input_reference_required", "input_reference")


def test_a_large_image_as_a_data_url_is_taken(i2v: Server) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    assert len(url) > 5 * 2**20
    with i2v.client() as client:
        for body in ({"data": {"prompt": PROMPT, "input_reference[image_url]": url}},
                     {"json": {"prompt": PROMPT, "input_reference": {"image_url": url}}}):  # fmt: skip
            answer = httpx.post(f"{i2v.url}/v1/videos", timeout=60, **body)
            assert answer.status_code == 200, answer.text
            client.videos.delete(answer.json()["id"])


def post(server: Server, reference: Any, **more: Any) -> tuple[int, str, str]:
    answer = httpx.post(
        f"{server.url}/v1/videos", json={"prompt": PROMPT, "input_reference": reference, **more}, timeout=60
    )
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_what_is_no_image_is_refused_and_leaves_nothing(i2v: Server, what: str) -> None:
    content, why = BAD_IMAGES[what]
    before = kept(i2v)
    answer = httpx.post(
        f"{i2v.url}/v1/videos", data={"prompt": PROMPT}, files={"input_reference": ("a.png", content)}, timeout=60
    )  # fmt: skip
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "invalid_input_reference")
    assert why in error["message"] and error["param"] == "input_reference"
    assert kept(i2v) == before


@pytest.mark.parametrize(
    ("reference", "status", "code"),
    [
        ({}, 422, "invalid_input_reference"),
        ({"file_id": "file-1"}, 422, "invalid_input_reference"),
        ({"image_url": DATA_URL, "file_id": "file-1"}, 422, "invalid_input_reference"),
        ({"image_url": 3}, 422, "invalid_input_reference"),
        ({"image_url": {"url": DATA_URL}}, 422, "invalid_input_reference"),
        ({"path": "/etc/passwd"}, 422, "invalid_input_reference"),
        ([DATA_URL], 422, "invalid_input_reference"),
        (7, 422, "invalid_input_reference"),
        ("data:image/png,abc", 422, "invalid_input_reference"),
        ("data:image/png;base64,a", 422, "invalid_input_reference"),
        ("data:image/png;base64,!!!!", 422, "invalid_input_reference"),
        ("data:image/svg+xml;base64,PHN2Zy8+", 422, "invalid_input_reference"),
        ("", 422, "image_url_refused"),
        ("/etc/passwd", 422, "image_url_refused"),
        ("file:///etc/passwd", 422, "image_url_refused"),
        ("https://example.org/cat.png", 422, "image_url_refused"),
    ],
)
def test_other_references_are_refused(i2v: Server, reference: Any, status: int, code: str) -> None:
    assert post(i2v, reference)[:2] == (status, code)


def test_two_images_are_refused(i2v: Server) -> None:
    answer = httpx.post(
        f"{i2v.url}/v1/videos", data={"prompt": PROMPT, "input_reference[image_url]": DATA_URL},
        files={"input_reference": ("a.jpg", PHOTO)},
    )  # fmt: skip
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "duplicate_parameter")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_server_fetches_nothing_from_its_own_machine_even_where_the_operator_named_it(
    ti2v: Server, host: str
) -> None:
    with suppress(openai.OpenAIError), ti2v.client() as client:
        client.videos.list()
    port = ti2v.url.rpartition(":")[2]
    assert post(ti2v, f"http://{host}/healthz")[1:] == (
        "image_url_refused",
        "The image_url names a host with an address that is not public.",
    )
    assert post(ti2v, f"http://{host}:{port}/healthz")[1] == "image_url_refused"


def test_an_image_of_too_many_bytes_is_refused(i2v: Server) -> None:
    url = f"data:image/png;base64,{base64.b64encode(PHOTO + bytes(MAX_BYTES)).decode()}"
    status, code, said = post(i2v, url)
    assert (status, code) == (422, "invalid_input_reference") and str(MAX_BYTES) in said
    assert post(i2v, url + url) == (413, "request_too_large", "The body is larger than 50331648 bytes.")


def test_other_fields_are_looked_at_first(i2v: Server) -> None:
    assert post(i2v, "https://example.org/cat.png", num_frames=16)[1] == "invalid_num_frames"


def test_an_idempotency_key_covers_the_image(i2v: Server) -> None:
    headers = {"Idempotency-Key": "picture-1"}

    def create(photo: bytes) -> httpx.Response:
        files = {"input_reference": ("a.jpg", photo)}
        return httpx.post(f"{i2v.url}/v1/videos", data={"prompt": PROMPT}, files=files, headers=headers)

    first = create(PHOTO).json()["id"]
    before = kept(i2v)
    assert create(PHOTO).json()["id"] == first
    assert create(photograph("blue")).json()["error"]["code"] == "idempotency_key_reused"
    assert kept(i2v) == before
    with i2v.client() as client:
        client.videos.delete(first)


@pytest.mark.long
def test_a_job_keeps_its_image_over_a_restart(tmp_path: Path) -> None:
    options = ["--checkpoint", str(image_to_video.wan22(tmp_path)), "--base", str(tiny_base())]
    asked = {**QUICK, "seed": 3}
    with running(tmp_path / "data", *options) as server, server.client() as client:
        server.wait_ready()
        long = {**QUICK, "num_inference_steps": 200}
        client.videos.create(prompt=PROMPT, input_reference=("a.jpg", PHOTO, JPEG), extra_body=long)
        queued = client.videos.create(prompt=PROMPT, input_reference=("b.jpg", PHOTO, JPEG), extra_body=asked)
        lost = client.videos.create(prompt=PROMPT, input_reference=("c.jpg", PHOTO, JPEG), extra_body=asked)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    stray = tmp_path / "data" / "inputs" / f"video_{'0' * 32}.png"
    stray.write_bytes(b"nobody's")
    (tmp_path / "data" / "inputs" / f"{lost.id}.png").unlink()
    with running(tmp_path / "data", *options) as server, server.client() as client:
        assert not stray.exists()
        server.wait_ready()
        wait_for(lambda: client.videos.list(order="asc").data[0].status == "in_progress", "the first job")
        client.videos.delete(client.videos.list(order="asc").data[0].id)
        done = client.videos.poll(queued.id)
        assert done.status == "completed" and extra(done, "image") == DIGEST
        failed = client.videos.poll(lost.id)
        assert failed.error is not None and failed.error.code == "start_image_lost"
        assert str(tmp_path) not in failed.error.message
