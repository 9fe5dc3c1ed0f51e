"""What a server on a GPU tells of its memory there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.conftest import QUICK, running
from tests.serve.test_metrics import values

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")]


def test_the_metrics_tell_what_the_worker_takes_of_the_gpu(tmp_path: Path) -> None:
    with running(tmp_path, "--metrics", "--device", "cuda") as server:
        server.wait_ready()
        held = values(server, "wan_worker_gpu_memory_bytes")[()]
        assert held > 0
        peaks = []
        with server.client() as client:
            for size in (128, 64):
                body = {**QUICK, "width": size, "height": size}
                assert (
                    client.videos.create_and_poll(prompt="a red circle", extra_body=body).status
                    == "completed"
                )
                peaks.append(values(server, "wan_worker_gpu_memory_peak_bytes")[()])
        assert peaks[0] > peaks[1] > 0  # of the last job, and not of all
