"""A small crowd on a real server, by the benchmark that measures a large one; and what keeps a crowd cheap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import ENVIRONMENT, SOAK

CROWD = (
    ("--pollers", "1000", "--readers", "200", "--rounds", "5")
    if SOAK
    else ("--pollers", "50", "--readers", "20")
)
FAST = () if SOAK else ("--rounds", "1", "--seconds", "3", "--waiting", "4", "--size", "64x64")


@pytest.mark.long
def test_a_crowd_is_answered_while_a_job_runs(root: Path) -> None:
    """Nobody is turned away or cut off, and every reader hears of steps. Times are the benchmark's to tell: here other
    tests have the same cores."""
    command = [sys.executable, str(root / "benchmarks" / "load.py"), "--json", *CROWD, *FAST]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=root)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)
    assert told["failed"] == 0
    assert told["answers_a_second"] > 0
    assert told["events"] >= 20 * 5
    assert told["loaded_step_ms"][0] > 0
    assert told["p50_ms"][0] < 1000
