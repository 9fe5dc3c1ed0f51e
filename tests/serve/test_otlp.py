"""What is refused of --otlp-endpoint, before anything is opened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import ENVIRONMENT
from tests.serve.test_cli import invoke

WITHOUT_THE_EXTRA = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from wan_runtime.serve.cli import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("localhost:4318", "it must be a collector's URL, such as http://localhost:4318."),
        ("grpc://localhost:4317", "it must be a collector's URL"),
        ("http://", "it must be a collector's URL"),
        ("", "it must be a collector's URL"),
        ("http://localhost:99999", "it must be a collector's URL"),
        ("http://local host:4318", "it must be a collector's URL"),
        ("http://[::1:4318", "it must be a collector's URL"),
        ("http://me:secret@localhost:4318", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://localhost:4318?a=b", "it must have no ?"),
        ("http://localhost:4318/v1/traces", "/v1/traces is added to it"),
    ],
)
def test_an_address_that_is_no_collectors_is_explained(tmp_path: Path, endpoint: str, said: str) -> None:
    result = invoke("--otlp-endpoint", endpoint, "--data-dir", str(tmp_path / "data"))
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not (tmp_path / "data").exists()


def test_a_file_may_name_the_collector(tmp_path: Path) -> None:
    file = tmp_path / "wan.toml"
    file.write_text('otlp-endpoint = "localhost"\n')
    result = invoke("--config", str(file), "--dry-run")
    assert (result.exit_code, "--otlp-endpoint is 'localhost'" in result.output) == (2, True), result.output


def test_without_the_extra_it_is_said_how_to_install_it(tmp_path: Path) -> None:
    options = ["--data-dir", str(tmp_path / "data"), "--otlp-endpoint", "http://localhost:4318"]
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA, *options]
    environment = {**ENVIRONMENT, "COLUMNS": "400"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "pip install 'wan-runtime[otel]'" in ended.stderr and "opentelemetry" in ended.stderr
    assert not (tmp_path / "data").exists()


def test_a_server_that_sends_no_spans_imports_no_sdk() -> None:
    code = "import sys, wan_runtime.serve.cli; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_a_variable_that_opentelemetry_does_not_take_ends_the_start(tmp_path: Path) -> None:
    options = ["--port", "0", "--data-dir", str(tmp_path), "--otlp-endpoint", "http://localhost:4318"]
    command = [sys.executable, "-m", "wan_runtime.serve", *options]
    environment = {**ENVIRONMENT, "OTEL_BSP_MAX_QUEUE_SIZE": "0"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "OpenTelemetry does not take its variables" in ended.stderr
    assert "max_queue_size must be a positive integer" in ended.stderr
