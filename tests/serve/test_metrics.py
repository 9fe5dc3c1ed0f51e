"""What Prometheus reads, from a server that has done something."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import QUICK, Server, running
from wan_runtime.serve.jobs import JobStore
from wan_runtime.serve.metrics import Metrics
from wan_runtime.serve.services import open_services
from wan_runtime.serve.settings import Settings
from wan_runtime.serve.storage import new_id

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
        while server.get(f"/v1/videos/{long.id}").json()["step"] < 1:
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
    with measured.client() as client:
        steps = sum(job.model_extra["step"] for job in client.videos.list() if job.model_extra)
    assert values(measured, "wan_step_seconds_count")[()] == steps >= 3  # the first of each job too
    phases = values(measured, "wan_phase_seconds_count")
    once, twice = {"decode", "encode"}, {"queued", "text", "denoise"}  # by the cancelled one too
    assert phases == {**{(name,): 1 for name in once}, **{(name,): 2 for name in twice}}
    for name in ("wan_job_seconds", "wan_phase_seconds"):
        edges = {float(edge) for edge, _ in values(measured, f"{name}_bucket")}
        assert {60.0, 600.0, 3600.0, float("inf")} <= edges


def test_a_job_that_the_last_server_left_is_counted_where_it_ends(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, metrics=True)
    with contextlib.closing(JobStore(tmp_path / "jobs.sqlite3")) as store:
        store.add(new_id(), "wan-tiny", {"num_inference_steps": 3})
        for _ in range(2):  # begun for the second time
            store.recover(lambda _: 0)
            store.claim()
    services = open_services(settings, lambda reason: None)
    metrics = Metrics()
    metrics.listen(services.engine.tell)
    services.tell_recovered()
    services.close()
    assert metrics.registry.get_sample_value("wan_job_failures_total", {"code": "server_restarted"}) == 1


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
