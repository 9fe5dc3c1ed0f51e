"""`--log-format json`: every line of both processes is an object, and names the request and the job it is about."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import QUICK, running
from wan_runtime.serve import logs

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    logger.handlers.clear()
    yield logger
    logging.captureWarnings(False)


def test_a_line_has_the_ids_of_what_it_is_about(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "json")
    log = logging.getLogger("wan_serve")
    with logs.about(request="req_1"), logs.about(job="video_2"):
        log.info("%s\nwas queued", "video_2")
    log.debug("not at this level")
    try:
        raise ValueError("out of range")
    except ValueError:
        log.exception("it failed")
    queued, failed = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert queued.pop("timestamp") and queued == {
        "level": "INFO", "logger": "wan_serve", "message": "video_2\nwas queued", "request_id": "req_1",
        "job_id": "video_2",
    }  # fmt: skip
    assert "request_id" not in failed and "ValueError: out of range" in failed["exc_info"]


@pytest.mark.long
def test_a_job_is_followed_from_its_request_to_its_end(tmp_path: Path) -> None:
    with running(tmp_path, "--log-format", "json") as server:
        server.wait_ready()
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", default_headers={"X-Request-Id": "mine-1"}
        ) as client:
            job = client.videos.create_and_poll(prompt="x", extra_body=QUICK)
        assert job.status == "completed"
        assert httpx.get(server.url + "/nowhere").status_code == 404
        lines: list[dict[str, Any]] = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= set(line) for line in lines)
    assert all(datetime.fromisoformat(line["timestamp"]).tzinfo is not None for line in lines)
    of_job = [line for line in lines if line.get("job_id") == job.id]
    assert [(line["logger"], line.get("request_id")) for line in of_job] == [
        ("wan_serve", "mine-1"),
        ("wan_serve.worker", None),
    ]
    assert [line["message"] for line in of_job] == [f"{job.id} was queued", f"{job.id} is done"]
