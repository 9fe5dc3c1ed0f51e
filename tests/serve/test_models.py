"""Several models behind one worker: it changes between jobs, in the order of their arrival, and says so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Video

from tests.builders import image_to_video
from tests.serve.conftest import QUICK, Server, running, wait_for
from tests.serve.test_cli import invoke
from tests.serve.test_start_images import photograph
from wan_runtime.bases import tiny_base, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a large red circle moving right on a black background"


def write(folder: Path) -> Path:
    """A file with a model of text and one of images, and a folder of LoRAs for the first alone."""
    checkpoint = image_to_video.wan22(folder)
    (folder / "loras").mkdir()
    (folder / "loras" / "film.safetensors").write_bytes(b"")
    file = folder / "wan.toml"
    file.write_text(
        f'[models.words]\ncheckpoint = "{tiny_checkpoint()}"\nlora-dir = "loras"\n'
        f'[models.pictures]\ncheckpoint = "{checkpoint.name}"\nbase = "{tiny_base()}"\n'
    )
    return file


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("both")
    with running(folder / "data", "--config", str(write(folder))) as server:
        server.wait_ready()
        yield server


def models(server: Server) -> dict[str, Any]:
    return {model["id"]: model for model in server.get("/v1/models").json()["data"]}


def create(client: openai.OpenAI, model: str | None, **fields: Any) -> Video:
    picture = {"input_reference": ("a.jpg", photograph(), "image/jpeg")} if model == "pictures" else {}
    body = {**QUICK, "seed": 3, **fields} | ({"model": model} if model else {})
    return client.videos.create(prompt=PROMPT, extra_body=body, **picture)  # type: ignore[arg-type]


@pytest.mark.long
def test_once_ready_each_has_been_loaded_and_the_first_is_held(both: Server) -> None:
    told = models(both)
    assert list(told) == ["words", "pictures"]
    assert [told[name]["limits_and_defaults"]["takes_image"] for name in told] == ["none", "required"]
    assert [[lora["name"] for lora in told[name]["loras"]] for name in told] == [["film"], []]
    assert all(told[name]["runtime"]["device"] == "cpu" for name in told)
    assert {model["phase"] for model in told.values()} == {"ready", "unloaded"}
    with both.client() as client:
        assert [model.id for model in client.models.list()] == ["words", "pictures"]
        assert client.models.retrieve("pictures").id == "pictures"
    assert both.get("/v1/models/others").status_code == 404


@pytest.mark.long
def test_jobs_run_in_their_order_and_the_worker_changes_between_them(both: Server) -> None:
    with both.client() as client:
        worker = both.worker()
        # the first is long enough for the others to be waiting behind it
        asked = [create(client, "words", num_inference_steps=40)]
        asked += [create(client, name) for name in ("pictures", "pictures", None)]
        assert [video.model for video in asked] == ["words", "pictures", "pictures", "words"]
        phases: set[tuple[str, int]] = set()

        def ended() -> bool:
            answer = both.get("/readyz")
            phases.add((answer.json()["phase"], answer.status_code))
            return client.videos.retrieve(asked[-1].id).status == "completed"

        wait_for(ended, "the last job", both)
        assert ("loading", 503) in phases and ("ready", 200) in phases
        done = [client.videos.retrieve(video.id) for video in asked]
        assert {video.status for video in done} == {"completed"}
        times = [video.completed_at for video in done]
        assert times == sorted(times)  # type: ignore[type-var]
        made_with = [(video.model_extra or {})["made_with"] for video in done]
        assert [made["model"] for made in made_with] == ["words", "pictures", "pictures", "words"]
        assert [made["checkpoints"] for made in made_with[:2]] == [
            [tiny_checkpoint().name],
            ["wan_i2v.safetensors"],
        ]
        assert both.worker() == worker
        assert models(both)["words"]["phase"] == "ready"
        assert both.get("/readyz").json() == {"ready": True, "phase": "ready", "model": "words"}


@pytest.mark.long
def test_a_waiting_job_is_told_that_its_model_is_being_loaded(both: Server) -> None:
    with both.client() as client:
        held = both.get("/readyz").json()["model"]
        video = create(client, "pictures" if held == "words" else "words")
        with httpx.stream("GET", f"{both.url}/v1/videos/{video.id}/events", timeout=120) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith(("event: ", "data: "))]
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert names[-1] == "done" and "loading" in names
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert "loading" in {told.get("phase") for told in data}


@pytest.mark.long
def test_each_model_has_its_own_limits(both: Server) -> None:
    with both.client() as client:
        for model, code in (("pictures", "input_reference_required"), ("words", "lora_not_found")):
            fields = {"lora": "gone"} if model == "words" else {}
            with pytest.raises(openai.UnprocessableEntityError) as refused:
                client.videos.create(prompt=PROMPT, extra_body={**QUICK, "model": model, **fields})
            assert refused.value.code == code
        with pytest.raises(openai.NotFoundError) as unknown:
            create(client, "others")
        assert unknown.value.code == "model_not_found" and "words, pictures" in unknown.value.message


@pytest.mark.long
def test_a_worker_that_dies_comes_back_with_the_model_of_its_job(both: Server) -> None:
    with both.client() as client:
        video = create(client, "pictures", num_inference_steps=200)
        wait_for(
            lambda: (client.videos.retrieve(video.id).model_extra or {})["step"] > 0, "a first step", both
        )
        os.kill(both.worker(), signal.SIGKILL)
        wait_for(lambda: client.videos.retrieve(video.id).status == "queued", "the job to go back", both)
        wait_for(lambda: client.videos.retrieve(video.id).status == "in_progress", "the job to run", both)
        assert both.get("/readyz").json()["model"] == "pictures"
        client.videos.delete(video.id)


@pytest.mark.long
def test_a_job_whose_model_is_gone_after_a_restart_fails_with_the_reason(tmp_path: Path) -> None:
    file = write(tmp_path)
    with running(tmp_path / "data", "--config", str(file)) as server, server.client() as client:
        server.wait_ready()
        create(client, "words", num_inference_steps=200)
        waiting = create(client, "pictures")
        server.process.kill()
        server.process.wait()
    with running(tmp_path / "data") as server, server.client() as client:
        server.wait_ready()
        gone = client.videos.poll(waiting.id)
        assert gone.error is not None and gone.error.code == "model_not_served"
        assert create(client, None).model == "wan-tiny"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = 3", "models are tables"),
        ("[models]\nwords = 3", "models are tables"),
        ("[models.words]\nbase = 'x'", "checkpoint is missing"),
        ("[models.words]\ncheckpoint = 'gone.safetensors'", "is not there"),
        ("[models.words]\ncheckpoint = 3", "not a string"),
        ("[models.words]\nport = '3'", "'port' is not an option"),
        ("[models.words]\nchekpoint = 'x'", "did you mean 'checkpoint'?"),
        ("[models.'../x']\ncheckpoint = 'wan.toml'", "no name of a model"),
        ("checkpoint = 'wan.toml'\n[models.words]\ncheckpoint = 'wan.toml'", "beside the file's [models]"),
    ],
)
def test_a_file_with_other_tables_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "wan.toml"
    file.write_text(text)
    result = invoke("--config", str(file), "--dry-run")
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_a_dry_run_shows_each_model(tmp_path: Path) -> None:
    result = invoke("--config", str(write(tmp_path)), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "words" in result.output and "pictures" in result.output and "wan_i2v.safetensors" in result.output
