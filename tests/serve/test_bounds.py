"""The guide's table of bounds, held against the numbers that the server goes by."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.responses import FileResponse

from wan_runtime import asking, starting
from wan_runtime.serve import admission, connections, events, fetching, uploads
from wan_runtime.serve.lora_fields import SCHEMA
from wan_runtime.serve.settings import Settings

KIB, MIB = 2**10, 2**20
DEFAULTS = Settings()
BOUNDS: dict[str, list[float]] = {
    "a request's head": [connections.HEAD_BYTES / KIB, DEFAULTS.upload_seconds],
    "its body": [uploads.MAX_BODY / MIB, DEFAULTS.upload_seconds],
    "all bodies at once": [uploads.MAX_HELD / MIB, uploads.SMALL / KIB],
    "JSON": [uploads.MAX_JSON_VALUES],
    "a form": [uploads.MAX_FIELDS, uploads.MAX_FILES, uploads.MAX_PERCENT],
    "an answer": [connections.PACE_BYTES / KIB, DEFAULTS.download_seconds],
    "connections": [connections.KEPT_FILES, connections.MOST, connections.TURNED_AWAY],
    "an idle connection": [connections.KEEP_ALIVE_SECONDS],
    "a byte range": [FileResponse.max_ranges],
    "a start image": [starting.MAX_BYTES / MIB, starting.MAX_PIXELS],
    "a fetched image": [fetching.MAX_URL, fetching.MAX_REDIRECTS, fetching.SECONDS, fetching.AT_ONCE],
    "a prompt": [asking.MAX_PROMPT],
    "LoRAs": [asking.MAX_LORAS, -asking.MAX_STRENGTH, asking.MAX_STRENGTH],
    "a clip": [asking.MAX_STEPS, DEFAULTS.max_job_seconds],
    "the queue": [admission.MAX_QUEUE_JOBS, DEFAULTS.max_queue_seconds],
    "event streams": [events.MAX_EVENTS, events.MAX_JOBS],
}


def rows(root: Path) -> dict[str, list[str]]:
    part = (root / "docs/serving.md").read_text().partition("\n## Bounds\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells[1:]}


def test_the_guide_lists_them_all(root: Path) -> None:
    assert list(rows(root)) == list(BOUNDS)


@pytest.mark.parametrize("of", BOUNDS)
def test_each_number_is_the_one_that_holds(root: Path, of: str) -> None:
    bound, beyond = rows(root)[of]
    without_statuses = re.sub(r"\b[45]\d\d\b", "", beyond)
    told = [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*", bound + without_statuses)]
    assert told == BOUNDS[of]
    assert SCHEMA["oneOf"][1]["maxItems"] == asking.MAX_LORAS  # type: ignore[index]
