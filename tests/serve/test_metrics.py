"""What Prometheus reads, from a server that has done something."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import QUICK, Server, running

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has completed one clip of two steps, cancelled another, and refused some requests."""
    with running(tmp_path_factory.mktemp("metrics"), "--metrics") as server:
        server.wait_ready()
        with server.client() as client:
            client.videos.create_and_poll(prompt="a red circle", extra_body=QUICK)
            long = client.videos.create(
                prompt="a red circle", extra_body={**QUICK, "num_inference_steps": 200}
            )
        while server.get(f"/v1/videos/{long.id}").json()["status"] != "in_progress":
            pass
        httpx.post(f"{server.url}/v1/videos/{long.id}/cancel", timeout=60)
        for number in range(3):
            server.get(f"/v1/videos/video_{number:032x}")
            server.get(f"/none/{number}")
        yield server


def values(server: Server, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric, by their labels' values in the order of their names."""
    answer = server.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}


def test_jobs_steps_phases_and_failures_are_counted(measured: Server) -> None:
    assert values(measured, "wan_job_seconds_count") == {("done",): 1, ("failed",): 1}
    assert values(measured, "wan_job_failures_total") == {("cancelled",): 1}
    assert values(measured, "wan_step_seconds_count")[()] >= 1
    assert values(measured, "wan_phase_seconds_count")[("encode",)] == 1
    edges = {float(edge) for edge, _ in values(measured, "wan_job_seconds_bucket")}
    assert {60.0, 600.0, 3600.0, float("inf")} <= edges


def test_requests_are_counted_by_the_templates_of_their_routes(measured: Server) -> None:
    counted = values(measured, "wan_http_request_seconds_count")
    assert counted[("GET", "/v1/videos/{video_id}", "404")] == 3
    assert counted[("GET", "none", "404")] == 3
    assert counted[("POST", "/v1/videos", "200")] == 2
    assert not [key for key in counted if "video_0" in key[1]]


def test_the_queue_and_the_worker_are_gauges(measured: Server) -> None:
    assert values(measured, "wan_queue_jobs") == {(): 0}
    assert values(measured, "wan_ready") == {(): 1}
    assert values(measured, "wan_worker_memory_bytes")[()] > 50e6


def test_without_the_option_there_are_none(server: Server) -> None:
    answer = server.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
