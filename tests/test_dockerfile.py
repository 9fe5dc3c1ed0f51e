"""The Dockerfile's promises that can be checked without an engine: what it copies exists, and how it runs."""

from __future__ import annotations

import ast
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wan_runtime.serve.cli import app


@pytest.fixture(scope="module")
def steps(root: Path) -> list[tuple[str, str]]:
    """(instruction, its text) of each step, continuation lines joined and comments dropped."""
    lines = [
        line for line in (root / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (s.partition(" ") for s in joined.splitlines() if s)
    ]


def final_stage(steps: list[tuple[str, str]]) -> list[tuple[str, str]]:
    last = max(at for at, (word, _) in enumerate(steps) if word == "FROM")
    return steps[last:]


def texts(steps: list[tuple[str, str]], word: str) -> list[str]:
    return [text for found, text in steps if found == word]


def test_each_path_it_copies_exists_and_is_sent(root: Path, steps: list[tuple[str, str]]) -> None:
    copied = [text.split() for text in texts(steps, "COPY") if "--from=" not in text]
    sources = [part for parts in copied for part in parts[:-1] if not part.startswith("--")]
    assert sources
    assert [source for source in sources if not (root / source).exists()] == []
    ignored = (root / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    assert [s for s in sources if not any(fnmatch(s.rstrip("/").split("/")[0], k) for k in kept)] == []


def test_every_folder_of_the_package_is_copied(root: Path, steps: list[tuple[str, str]]) -> None:
    """The build stage gets all that the wheel is made of."""
    copied = " ".join(texts(steps, "COPY")).split()
    for needed in (
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "wan_runtime",
        "patches",
        "serve",
    ):
        assert any(part.rstrip("/") == needed for part in copied), needed
    assert any(part.startswith("models") for part in copied)


def test_the_base_is_an_argument_and_the_build_has_stages(steps: list[tuple[str, str]]) -> None:
    bases = texts(steps, "FROM")
    assert len(bases) >= 2
    assert steps[0][0] == "ARG"
    assert steps[0][1].startswith("BASE_IMAGE=nvidia/cuda:")
    assert "runtime" in steps[0][1]
    assert bases[-1].split()[0] == "${BASE_IMAGE}"


def test_it_runs_as_a_user(steps: list[tuple[str, str]]) -> None:
    users = texts(final_stage(steps), "USER")
    assert users
    assert users[-1].split(":")[0] not in {"root", "0"}


def test_its_entry_point_is_the_server(steps: list[tuple[str, str]]) -> None:
    """Arguments to `docker run` replace a CMD, and with it what makes the server reachable: so there is none."""
    assert texts(steps, "ENTRYPOINT") == ['["wan-serve"]']
    assert texts(steps, "CMD") == []
    environment = dict(
        part.split("=", 1) for text in texts(final_stage(steps), "ENV") for part in text.split()
    )
    options = {name: value for name, value in environment.items() if name.startswith("WAN_SERVE_")}
    assert options == {
        "WAN_SERVE_HOST": "0.0.0.0",
        "WAN_SERVE_PORT": "8000",
        "WAN_SERVE_ALLOW_REMOTE": "1",
        "WAN_SERVE_DATA_DIR": "/data",
    }


def test_the_server_reads_those_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong one stops the command at once, with its name: so it was read."""
    runner = CliRunner()
    monkeypatch.setenv("WAN_SERVE_PORT", "70000")
    assert "65535" in runner.invoke(app, []).output
    monkeypatch.delenv("WAN_SERVE_PORT")
    monkeypatch.setenv("WAN_SERVE_HOST", "0.0.0.0")
    refused = runner.invoke(app, [])
    assert refused.exit_code == 2
    assert "0.0.0.0" in refused.output


def test_its_volumes_are_models_and_data(steps: list[tuple[str, str]]) -> None:
    assert [json.loads(text) for text in texts(steps, "VOLUME")] == [["/models", "/data"]]


def test_it_asks_readiness_with_python_alone(steps: list[tuple[str, str]]) -> None:
    (check,) = texts(steps, "HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + len("CMD") :])
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])
    assert "/readyz" in command[2]
    assert "curl" not in check


def test_it_leaves_no_package_lists_or_caches(steps: list[tuple[str, str]]) -> None:
    for text in texts(steps, "RUN"):
        if "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists" in text
        if "pip install" in text:
            assert "--no-cache-dir" in text
    assert not any(re.search(r"\blatest\b", base) for base in texts(steps, "FROM"))
