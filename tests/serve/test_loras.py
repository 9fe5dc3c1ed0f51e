"""LoRAs by name through the real `openai` client, from a folder that only the operator writes to."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from safetensors.torch import save_file

from tests.serve.conftest import QUICK, Server, running, same_clip
from tests.serve.test_start_images import frames_of
from tests.test_adapters import broken, diffusers_names, original_names

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a large red circle moving right on a black background"
ASKED = {**QUICK, "seed": 3}
INK = "Ink wash v1.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    save_file(diffusers_names(), folder / f"{INK}.safetensors")
    save_file(original_names(1), folder / "film.safetensors")
    save_file(broken(diffusers_names())["another width"], folder / "misfit.safetensors")
    (folder / "old.pt").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture(scope="module")
def styled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("styled"), "--lora-dir", str(folder)) as server:
        server.wait_ready()
        yield server


def test_the_folders_loras_are_listed_with_the_model(styled: Server, server: Server, folder: Path) -> None:
    [model] = styled.get("/v1/models").json()["data"]
    assert [lora["name"] for lora in model["loras"]] == [INK, "film", "misfit"]
    assert model["loras"][1] == {
        "name": "film", "experts": ["high", "low"], "bytes": (folder / "film.safetensors").stat().st_size,
    }  # fmt: skip
    assert server.get("/v1/models").json()["data"][0]["loras"] == []


@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        ("film", {"film": 1.0}),
        (["film"], {"film": 1.0}),
        ([INK, "film"], {INK: 1.0, "film": 1.0}),
        ({"name": "film", "strength": 0.5}, {"film": 0.5}),
        ([{"name": INK, "strength": 0.5}, {"name": "film", "strength": -1}], {INK: 0.5, "film": -1.0}),
    ],
)
def test_each_way_to_write_it_means_the_same_in_a_form_and_in_json(
    styled: Server, way: Any, wanted: dict[str, float]
) -> None:
    long = {**ASKED, "num_inference_steps": 200}
    with styled.client() as client:
        videos = [client.videos.create(prompt=PROMPT, extra_body={**long, "lora": way})]
        if not isinstance(way, dict):  # in JSON an object stands in a list
            body = {"prompt": PROMPT, **long, "lora": way}
            answer = httpx.post(f"{styled.url}/v1/videos", json=body).json()
            videos.append(client.videos.retrieve(answer["id"]))
        assert [(video.model_extra or {})["lora"] for video in videos] == [wanted] * len(videos)
        for video in reversed(videos):
            client.videos.delete(video.id)


def test_a_lora_changes_its_own_clip_alone_and_is_told(styled: Server, folder: Path) -> None:
    with styled.client() as client:
        plain = frames_of(client, client.videos.create_and_poll(prompt=PROMPT, extra_body=ASKED))
        video = client.videos.create_and_poll(prompt=PROMPT, extra_body={**ASKED, "lora": ["film"]})
        assert np.abs(frames_of(client, video) - plain).mean() > 3
        after = client.videos.create_and_poll(prompt=PROMPT, extra_body=ASKED)
        assert same_clip(frames_of(client, after), plain)
        digest = hashlib.sha256((folder / "film.safetensors").read_bytes()).hexdigest()
        assert (video.model_extra or {})["made_with"]["loras"] == {"film": [digest]}
        assert "loras" not in (after.model_extra or {})["made_with"]
        with av.open(io.BytesIO(client.videos.download_content(video.id).content)) as container:
            told = json.loads(container.metadata["comment"])
        assert (told["loras"], told["request"]["lora"]) == ({"film": [digest]}, {"film": 1.0})


def test_a_file_that_does_not_fit_fails_its_job_alone(styled: Server, folder: Path) -> None:
    with styled.client() as client:
        video = client.videos.create_and_poll(prompt=PROMPT, extra_body={**ASKED, "lora": "misfit"})
        assert video.error is not None and video.error.code == "lora_unusable"
        assert "'misfit'" in video.error.message and str(folder) not in video.error.message
        assert client.videos.create_and_poll(prompt=PROMPT, extra_body=ASKED).status == "completed"


@pytest.mark.parametrize(
    ("lora", "code"),
    [
        ("gone", "lora_not_found"),
        ("old", "lora_not_found"),
        ("film.safetensors", "lora_not_found"),
        ("../film", "lora_not_found"),
        ("/etc/passwd", "lora_not_found"),
        ("", "lora_not_found"),
        ("FILM", "lora_not_found"),
        ("film\0", "lora_not_found"),
        ("film/", "lora_not_found"),
        ("./film", "lora_not_found"),
        ("fi%6cm", "lora_not_found"),
        ("x" * 5000, "lora_not_found"),
        (["film", "film"], "invalid_lora"),
        ([{"name": "film", "path": "/etc/passwd"}], "invalid_lora"),
        ([{"strength": 1}], "invalid_lora"),
        ([{"name": "film", "strength": 9}], "invalid_lora"),
        ([{"name": "film", "strength": "NaN"}], "invalid_lora"),
        ([{"name": ["film"]}], "invalid_lora"),
        (7, "invalid_lora"),
        ([7], "invalid_lora"),
    ],
)
def test_what_is_not_one_of_them_is_refused(styled: Server, lora: Any, code: str) -> None:
    answer = httpx.post(f"{styled.url}/v1/videos", json={"prompt": PROMPT, "lora": lora})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, "lora")


def test_strengths_that_nobody_could_tell_apart_are_refused(styled: Server) -> None:
    """The client's form has the names and the strengths apart: here two names and one strength."""
    lora = [{"name": INK}, {"name": "film", "strength": 0.5}]
    with styled.client() as client, pytest.raises(openai.UnprocessableEntityError) as refused:
        client.videos.create(prompt=PROMPT, extra_body={"lora": lora})
    assert refused.value.code == "invalid_lora" and "2 names and 1 strengths" in refused.value.message


@pytest.mark.long
def test_a_folder_that_goes_away_fails_its_jobs_and_not_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(original_names(1), folder / "film.safetensors")
    with running(tmp_path / "data", "--lora-dir", str(folder)) as server, server.client() as client:
        server.wait_ready()
        client.videos.create(prompt=PROMPT, extra_body={**ASKED, "num_inference_steps": 40})
        waiting = client.videos.create(prompt=PROMPT, extra_body={**ASKED, "lora": "film"})
        (folder / "film.safetensors").unlink()
        folder.rmdir()
        failed = client.videos.poll(waiting.id)
        assert failed.error is not None and failed.error.code == "lora_not_found"
        assert str(tmp_path) not in failed.error.message
        assert server.get("/v1/models").json()["data"][0]["loras"] == []
        assert client.videos.create_and_poll(prompt=PROMPT, extra_body=ASKED).status == "completed"


def test_without_a_folder_there_are_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.videos.create(prompt=PROMPT, extra_body={"lora": "film"})
    assert refused.value.code == "lora_unsupported"
