"""The worker process: its death is its job's alone, and it never outlives the server."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serve.conftest import ENVIRONMENT, QUICK, Server, alive, running, start, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
LONG = {**QUICK, "num_inference_steps": 200}
OPTIONS = ("--cancel-seconds", "2", "--stall-seconds", "8", "--drain-seconds", "0")
PROMPT = "a small yellow square moving up on a navy background"


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this file's own, whose processes get killed."""
    with running(tmp_path_factory.mktemp("doomed"), *OPTIONS) as server:
        yield server


def step_of(client: openai.OpenAI, video: str) -> int:
    return int((client.videos.retrieve(video).model_extra or {})["step"])


def test_the_server_answers_while_the_model_loads(doomed: Server) -> None:
    loading = doomed.get("/readyz")
    assert loading.status_code == 503
    assert loading.json()["phase"] in ("starting", "importing", "loading", "warming")
    assert doomed.get("/v1/models").json()["data"][0]["limits_and_defaults"] is None
    with doomed.client(max_retries=0) as client, pytest.raises(openai.InternalServerError) as refused:
        client.videos.create(prompt=PROMPT)
    assert (refused.value.status_code, refused.value.code) == (503, "model_not_ready")
    assert refused.value.response.headers["retry-after"] == "2"
    doomed.wait_ready()


@pytest.mark.long
def test_a_job_whose_worker_is_killed_twice_fails_with_the_reason_and_the_next_job_runs(
    doomed: Server,
) -> None:
    doomed.wait_ready()
    with doomed.client() as client:
        video = client.videos.create(prompt=PROMPT, extra_body=LONG)
        queued = client.videos.create(prompt=PROMPT, extra_body=QUICK)
        killed = set()
        for _ in range(2):
            wait_for(lambda: step_of(client, video.id) > 0, "a first step")
            killed.add(doomed.worker())
            os.kill(doomed.worker(), signal.SIGKILL)
            wait_for(
                lambda: step_of(client, video.id) == 0 or status(client, video.id) == "failed", "its end"
            )
        assert len(killed) == 2  # it was begun again, by another worker
        failed = client.videos.poll(video.id)
        assert failed.status == "failed" and failed.error is not None
        assert failed.error.code == "worker_died"
        assert "SIGKILL" in failed.error.message and "of 200 steps" in failed.error.message
        assert "begun 2 times" in failed.error.message
        with pytest.raises(openai.BadRequestError) as refused:
            client.videos.download_content(video.id)
        assert refused.value.code == "video_failed"
        assert client.videos.poll(queued.id).status == "completed"


def status(client: openai.OpenAI, video: str) -> str:
    return client.videos.retrieve(video).status


@pytest.mark.long
def test_a_worker_that_hangs_is_noticed_by_its_steps_and_killed(doomed: Server) -> None:
    doomed.wait_ready()
    with doomed.client() as client:
        video = client.videos.create(prompt=PROMPT, extra_body={**QUICK, "num_inference_steps": 100})
        wait_for(lambda: step_of(client, video.id) > 0, "a first step")
        worker = doomed.worker()
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: not alive(worker), "the watchdog", doomed)
        assert "it did nothing for" in doomed.log.read_text()
        assert client.videos.poll(video.id).status == "completed"  # begun again by another


@pytest.mark.long
def test_a_worker_that_does_not_answer_a_cancel_is_killed(doomed: Server) -> None:
    doomed.wait_ready()
    with doomed.client() as client:
        video = client.videos.create(prompt=PROMPT, extra_body=LONG)
        wait_for(lambda: step_of(client, video.id) > 0, "a first step")
        worker = doomed.worker()
        os.kill(worker, signal.SIGSTOP)
        began = time.monotonic()
        assert client.videos.delete(video.id).deleted
        assert time.monotonic() - began >= 2
        assert not alive(worker)


def test_a_killed_server_takes_its_worker_along_and_its_jobs_survive(doomed: Server) -> None:
    doomed.wait_ready()
    with doomed.client() as client:
        done = client.videos.create_and_poll(prompt=PROMPT, extra_body=QUICK)
        content = client.videos.download_content(done.id).content
        half = client.videos.create(prompt=PROMPT, extra_body={**LONG, "num_inference_steps": 60})
        waiting = client.videos.create(prompt=PROMPT, extra_body=QUICK)
        wait_for(lambda: step_of(client, half.id) > 0, "a first step")
    worker = doomed.worker()
    doomed.process.kill()
    doomed.process.wait()
    wait_for(lambda: not alive(worker), "the worker to die with the server")
    leftover = doomed.data_dir / "videos" / f".{half.id}.mp4.1.part"
    leftover.write_bytes(b"half a clip")
    with running(doomed.data_dir, *OPTIONS) as again, again.client() as client:
        assert not leftover.exists()
        assert client.videos.retrieve(done.id).status == "completed"
        assert client.videos.download_content(done.id).content == content
        assert client.videos.retrieve(waiting.id).status == "queued"
        assert client.videos.poll(half.id).status == "completed"  # it was begun again
        assert client.videos.poll(waiting.id).status == "completed"
        _stopping_puts_the_job_back(again, client)


def _stopping_puts_the_job_back(server: Server, client: openai.OpenAI) -> None:
    """Part of the test above, which has the server for it: an orderly stop loses nothing and counts as no attempt."""
    video = client.videos.create(prompt=PROMPT, extra_body=LONG)
    wait_for(lambda: step_of(client, video.id) > 0, "a first step")
    worker = server.worker()
    os.kill(
        worker, signal.SIGTERM
    )  # service managers signal the whole group: the worker leaves it to the server
    server.process.terminate()
    assert server.process.wait(120) == 0
    assert not alive(worker)
    with sqlite3.connect(server.data_dir / "jobs.sqlite3") as db:
        assert db.execute("SELECT status, attempts FROM jobs WHERE id = ?", (video.id,)).fetchone() == (
            "queued",
            0,
        )
    db.close()
    assert "Traceback" not in server.log.read_text()


def test_a_model_that_cannot_be_loaded_ends_the_server_and_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    server = start(tmp_path / "data", "--checkpoint", str(broken))
    assert server.process.wait(60) == 1
    log = server.log.read_text()
    assert "wan-serve cannot go on" in log and "broken.safetensors" in log
    assert "Traceback" not in log


def test_two_servers_do_not_share_a_data_directory(server: Server) -> None:
    command = [sys.executable, "-m", "wan_runtime.serve", "--port", "0", "--data-dir", str(server.data_dir)]
    second = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert "another wan-serve has the data directory" in second.stderr
