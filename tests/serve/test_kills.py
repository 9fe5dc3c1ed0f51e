"""`kill -9` of worker and server at random moments, under load: no job lost, none made twice, no half file served."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import av
import pytest

from tests.serve.conftest import QUICK, SOAK, Server, start, wait_for

pytestmark = [pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"), pytest.mark.long]
PROMPT = "a small purple circle moving up on a green background"
ROUNDS = 100 if SOAK else 3
ENDS = {"completed", "failed"}


@pytest.mark.timeout(4 * 3600 if SOAK else 600)
def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(11)
    server = start(tmp_path)
    server.wait_ready()
    made: list[str] = []
    logs: list[str] = []
    for number in range(ROUNDS):
        with server.client() as client:
            steps = chance.choice((2, 5, 20))
            for _ in range(2):
                body = {**QUICK, "num_inference_steps": steps}
                made.append(client.videos.create(prompt=PROMPT, extra_body=body).id)
        time.sleep(chance.random())
        if number % 2:
            with contextlib.suppress(ProcessLookupError, AssertionError):  # it may be between two workers
                os.kill(server.worker(), signal.SIGKILL)
        else:
            server.process.kill()
            server.process.wait()
            logs.append(server.log.read_text())
            server = start(tmp_path)
        server.wait_ready()
    _settle(server, made)
    logs.append(server.log.read_text())
    server.process.terminate()
    assert server.process.wait(120) == 0
    _check_rows_and_files(tmp_path, made)
    finished = Counter(re.findall(r"(video_[0-9a-f]{32}) is done", "\n".join(logs)))
    assert not [job for job, times in finished.items() if times > 1], "a job was made twice"


def _settle(server: Server, made: list[str]) -> None:
    with server.client() as client:
        for job in made:
            wait_for(lambda job=job: client.videos.retrieve(job).status in ENDS, job, server)  # type: ignore[misc]
            video = client.videos.retrieve(job)
            if video.status == "failed":
                assert video.error is not None and video.error.code in ("worker_died", "server_restarted")
                continue
            content = client.videos.download_content(job).content
            with av.open(io.BytesIO(content)) as container:
                assert sum(1 for _ in container.decode(video=0)) == 5


def _check_rows_and_files(root: Path, made: list[str]) -> None:
    db = sqlite3.connect(root / "jobs.sqlite3")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = dict(db.execute("SELECT id, status FROM jobs").fetchall())
    attempts = dict(db.execute("SELECT id, attempts FROM jobs WHERE status = 'failed'").fetchall())
    db.close()
    assert set(rows) == set(made)
    assert all(times == 2 for times in attempts.values())  # each had its second chance
    completed = {job for job, status in rows.items() if status == "completed"}
    for suffix in ("mp4", "webp", "jpg"):
        assert {path.stem for path in (root / "videos").glob(f"*.{suffix}")} == completed
    assert not list((root / "videos").glob(".*"))
