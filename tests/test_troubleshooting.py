"""docs/troubleshooting.md: what it tells users to run exists, and every error class has its entry."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import wan_runtime
from wan_runtime import errors
from wan_runtime.cli import app
from wan_runtime.serve.cli import app as serve_app

GROUP: Any = typer.main.get_command(app)
SERVE: Any = typer.main.get_command(serve_app)


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "troubleshooting.md").read_text()


def commands() -> dict[str, set[str]]:
    """Every command -> its options."""
    found = {name: options_of(command) for name, command in GROUP.commands.items()}
    return {**found, "wan-serve": options_of(SERVE)}


def options_of(command: Any) -> set[str]:
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)}


def test_every_command_exists_with_the_options_it_is_given(page: str) -> None:
    known = commands()
    lines = re.findall(r"^    (wan-.*)$", page, flags=re.MULTILINE)
    spans = [*lines, *re.findall(r"`([^`]+)`", page)]
    named = [
        re.sub(r"\s+", " ", span).partition("#")[0]
        for span in spans
        if span.startswith(("wan-runtime ", "wan-serve"))
    ]
    assert len(named) > 20
    for line in named:
        command = line.removeprefix("wan-runtime ").split()[0]
        assert command in known, line
        assert set(re.findall(r"--[a-z][a-z0-9-]*", line)) <= known[command], line


def test_every_option_belongs_to_a_command(page: str) -> None:
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", page))
    assert len(named) > 10
    assert named <= set().union(*commands().values())


def test_every_function_exists(page: str) -> None:
    named = set(re.findall(r"\bwan_runtime\.([a-z_]+)", page))
    assert {"patch", "load"} <= named and all(hasattr(wan_runtime, name) for name in named)


def test_every_error_has_an_entry(page: str) -> None:
    classes = {
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.WanRuntimeError) and value is not errors.WanRuntimeError
    }
    assert classes <= set(re.findall(r"^### (\w+)$", page, flags=re.MULTILINE))


def test_what_it_quotes_of_our_messages_is_what_they_say(page: str, root: Path) -> None:
    entries = page.partition("## Messages of wan-runtime")[2].partition("\n## ")[0]
    quoted = re.findall(r"`([a-z][a-z ]{15,})`", entries)
    parts = (
        "and has no scale",
        "ways that give different weights",
        "which is not read",
        "not a WAN transformer that",
    )
    sources = [path for path in (root / "wan_runtime").rglob("*.py") if "tiny" not in path.parts]
    code = "".join(re.sub(r'"\s+f?"', "", path.read_text()) for path in sources)
    assert len(quoted) >= 4
    for words in (*quoted, *parts):
        assert words in re.sub(r"\s+", " ", page) and words in code, words


def test_other_pages_lead_to_it(root: Path) -> None:
    for name in ("README.md", "docs/cli.md"):
        assert "troubleshooting.md" in (root / name).read_text()
