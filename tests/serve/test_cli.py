"""The command line refuses what cannot be served before anything is opened or bound."""

from __future__ import annotations

import socket
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from wan_runtime.serve.cli import app


def invoke(*options: str, **environment: str) -> Result:
    return CliRunner().invoke(app, list(options), env={"COLUMNS": "400", "TERM": "dumb", **environment})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--allow-remote"),
        (["--host", "::"], "--allow-remote"),
        (["--checkpoint", "gone.safetensors"], "does not exist"),
        (["--log-level", "loud"], "one of debug, info, warning, error"),
        (["--port", "70000"], "65535"),
        (["--cheque-point", "x"], "--checkpoint"),
        (["--api-keys", "gone.json"], "does not exist"),
        (["--api-keys", "pyproject.toml"], "is not a file that `wan-serve keys add` wrote"),
        (["--allow-origin", "example.org"], "it must be a scheme and a host"),
        (["--allow-origin", "*"], "it must be a scheme and a host"),
    ],
)
def test_a_bad_option_is_explained(tmp_path: Path, options: list[str], said: str) -> None:
    result = invoke(*options, "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "data").exists()


def test_options_can_come_from_the_environment(tmp_path: Path) -> None:
    result = invoke("--data-dir", str(tmp_path / "data"), WAN_SERVE_HOST="0.0.0.0")
    assert result.exit_code == 2
    assert "0.0.0.0 can be reached from other machines" in result.output


def test_the_low_expert_needs_the_high_one(tmp_path: Path) -> None:
    low = tmp_path / "low.safetensors"
    low.touch()
    result = invoke("--checkpoint-low", str(low), "--data-dir", str(tmp_path / "data"))
    assert (result.exit_code, "--checkpoint-low needs --checkpoint" in result.output) == (2, True)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke("--port", str(port), "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.output


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    result = invoke("--port", "0", "--data-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "a newer one wrote it" in result.output
