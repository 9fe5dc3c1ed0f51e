"""schemathesis against a running server: what /openapi.json promises is what comes, whatever is sent; never a 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.serve.conftest import QUICK, SOAK, Server, running
from wan_runtime import ClipRequest, InvalidRequest
from wan_runtime.serve import keys
from wan_runtime.serve.openapi import BOUNDS, create_body
from wan_runtime.serve.parsing import CreateVideo

EXAMPLES = 1000 if SOAK else 10
AT_LEAST = ("--max-time", "600") if SOAK else ()  # fuzzing and stateful testing go on until then
# A schema cannot say what this one model serves (4n+1 frames, its multiple, its pixels), nor what fits into the queue,
# nor which contents a job has.
CONFIG = """
[dictionaries.jobs]
values = ["{job}"]
[parameters]
"path.video_id" = {{ dictionary = "jobs", probability = 0.7 }}
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 404, 422, 429]
[[operations]]
include-path = "/v1/videos/{{video_id}}/content"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404]
"""
REQUEST: dict[str, Any] = {
    "prompt": "x", "width": 64, "height": 64, "num_frames": 5, "fps": 8, "num_inference_steps": 2, "seed": 0,
    "guidance_scale": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    key, record = keys.make("fuzzer")
    keys.add(file, record)
    return file, key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, key: tuple[Path, str]) -> Iterator[Server]:
    """A server of its own, with a key and little patience: most clips that it is asked for are too much for it."""
    options = ("--api-keys", str(key[0]), "--max-job-seconds", "2", "--max-queue-seconds", "6")
    with running(tmp_path_factory.mktemp("openapi"), *options) as server:
        server.wait_ready()
        yield server


@pytest.mark.timeout(7200 if SOAK else 300)
def test_every_answer_is_as_the_schema_says(server: Server, key: tuple[Path, str], tmp_path: Path) -> None:
    import openai

    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key[1]) as client,
        pytest.warns(DeprecationWarning),
    ):
        job = client.videos.create_and_poll(prompt="x", extra_body=QUICK).id
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(job=job))
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {key[1]}", "--max-examples", str(EXAMPLES), "--seed", "1",
        "--generation-database", "none", "--warnings", "off", "--no-color", *AT_LEAST,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 selected / 11 total" in done.stdout
    assert "ERROR" not in server.log.read_text()


@pytest.mark.parametrize(
    "name", [name for name in BOUNDS if name not in ("size", "width", "height", "num_frames")]
)
def test_the_bounds_in_the_schema_are_those_of_the_library(name: str) -> None:
    """Each bound is taken, and what lies just beyond it is not; by both."""
    bounds = BOUNDS[name]
    step = 0.001 if isinstance(bounds.get("minimum"), float) or name.startswith("guidance") else 1
    inside = [bounds[side] for side in ("minimum", "maximum") if side in bounds]
    outside = [
        bounds[side] + sign * step for side, sign in (("minimum", -1), ("maximum", 1)) if side in bounds
    ]
    if "maxLength" in bounds:
        inside, outside = ["x" * bounds["maxLength"]], ["x" * (bounds["maxLength"] + 1)]
    if "pattern" in bounds:
        outside += ["", " \n"]
    schema = create_body(CreateVideo)["content"]["application/json"]["schema"]["properties"][name]
    for value in inside:
        ClipRequest(**{**REQUEST, name: value})
        jsonschema.validate(value, schema)
    for value in outside:
        with pytest.raises(InvalidRequest):
            ClipRequest(**{**REQUEST, name: value})
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)


def test_with_keys_the_schema_says_which_calls_ask_for_one(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert paths["/v1/videos"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in paths["/healthz"]["get"]
