"""Hours of use in short: the smallest clips there are, thousands of them, by every kind of client. Nothing may grow."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import SOAK, Server, running, wait_for

pytestmark = pytest.mark.long
LEAST = {"prompt": "a small blue circle moving up on a white background", "width": 16, "height": 16, "num_frames": 1,
         "num_inference_steps": 1}  # fmt: skip
JOBS = 4000 if SOAK else 120
BATCH = 20
MIB = 2**20


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def measure(server: Server) -> dict[str, int]:
    worker = server.worker()
    return {
        "server MiB": resident(server.process.pid) // MIB,
        "worker MiB": resident(worker) // MIB,
        "server files": descriptors(server.process.pid),
        "worker files": descriptors(worker),
    }


def one_batch(client: httpx.Client, chance: random.Random) -> Counter[str]:
    """Some jobs: all read to their end as events, some cancelled or deleted on the way, most fetched and deleted."""
    made = [
        client.post("/v1/videos", json={**LEAST, "seed": seed}).raise_for_status().json()["id"]
        for seed in range(BATCH)
    ]
    for job in chance.sample(made, 2):
        client.post(f"/v1/videos/{job}/cancel").raise_for_status()
    gone = chance.sample(made, 2)
    for job in gone:
        client.delete(f"/v1/videos/{job}").raise_for_status()
    ends: Counter[str] = Counter()
    for job in made:
        if job in gone:
            assert client.get(f"/v1/videos/{job}").status_code == 404
            continue
        stream = client.get(f"/v1/videos/{job}/events").text
        assert "event: done" in stream or "event: failed" in stream
        video = client.get(f"/v1/videos/{job}").json()
        ends[video["status"] if video["error"] is None else video["error"]["code"]] += 1
        if video["status"] == "completed":
            assert client.get(f"/v1/videos/{job}/content").content[4:8] == b"ftyp"
        client.delete(f"/v1/videos/{job}").raise_for_status()
    return ends


@pytest.mark.timeout(4 * 3600 if SOAK else 900)
def test_thousands_of_jobs_leave_no_trace(tmp_path: Path) -> None:
    chance, ends, seen = random.Random(2), Counter[str](), []
    with running(tmp_path, "--metrics") as server, httpx.Client(base_url=server.url, timeout=120) as client:
        server.wait_ready()
        for _ in range(JOBS // BATCH):
            ends += one_batch(client, chance)
            client.get("/metrics").raise_for_status()
            seen.append(measure(server))
        worker = client.get("/v1/models/wan-tiny").json()["worker"]
        wait_for(lambda: not list((tmp_path / "videos").iterdir()), "the last files to go", server)
        assert "ERROR" not in server.log.read_text()
    print(
        {name: [seen[0][name], seen[len(seen) // 2][name], seen[-1][name]] for name in seen[0]}, ends, worker
    )
    assert set(ends) <= {"completed", "cancelled"} and ends["completed"] >= JOBS * 0.8
    assert worker["clips"] >= ends["completed"]  # one process made them all
    quarter = len(seen) // 4
    for name, room in (("server MiB", 8), ("worker MiB", 24), ("server files", 3), ("worker files", 1)):
        early = statistics.median(sample[name] for sample in seen[quarter : 2 * quarter])
        late = statistics.median(sample[name] for sample in seen[-quarter:])
        assert late <= early + room, f"{name} grew from {early} to {late}"
