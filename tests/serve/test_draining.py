"""SIGTERM: the running job ends, the queued ones wait for the next start, and the server answers meanwhile."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import openai
import pytest

from tests.serve.conftest import QUICK, running, wait_for

pytestmark = [pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"), pytest.mark.long]
PROMPT = "a small purple circle moving up on a green background"


def test_a_stop_lets_the_running_job_end_and_takes_no_more(tmp_path: Path) -> None:
    with running(tmp_path, "--drain-seconds", "300") as server:
        server.wait_ready()
        with server.client(max_retries=0) as client:
            body = {**QUICK, "num_inference_steps": 100}
            first, second = (client.videos.create(prompt=PROMPT, extra_body=body).id for _ in range(2))
            wait_for(
                lambda: client.videos.retrieve(first).status == "in_progress", "the first to run", server
            )
            server.process.terminate()
            wait_for(lambda: server.get("/readyz").json()["phase"] == "draining", "the drain", server)
            assert server.get("/readyz").status_code == 503
            with pytest.raises(openai.InternalServerError) as refused:
                client.videos.create(prompt=PROMPT, extra_body=QUICK)
            assert (refused.value.status_code, refused.value.code) == (503, "server_draining")
        assert server.process.wait(300) == 0
    db = sqlite3.connect(tmp_path / "jobs.sqlite3")
    rows = dict(db.execute("SELECT id, status FROM jobs").fetchall())
    db.close()
    assert rows == {first: "completed", second: "queued"}
    assert (tmp_path / "videos" / f"{first}.mp4").is_file()
    assert "Traceback" not in server.log.read_text()
