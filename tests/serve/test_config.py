"""Options from a TOML file: the options' own names, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.serve.test_cli import invoke


def dry(file: Path, *options: str, **environment: str) -> str:
    result = invoke("--config", str(file), "--dry-run", *options, **environment)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_file_gives_options_and_the_command_line_and_the_environment_win(tmp_path: Path) -> None:
    file = tmp_path / "wan.toml"
    file.write_text('port = 1234\ndata-dir = "clips"\nallow_remote = true\nhost = "0.0.0.0"\n')
    told = dry(file)
    assert "0.0.0.0, port 1234" in told
    assert str(tmp_path / "clips") in told  # a path in the file starts at the file
    assert "0.0.0.0, port 99" in dry(file, "--port", "99")
    assert "0.0.0.0, port 98" in dry(file, WAN_SERVE_PORT="98")
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "'prot' is not an option; did you mean 'port'?"),
        ("zzzzzzz = 1", "'zzzzzzz' is not an option; known are"),
        ('config = "other.toml"', "'config' is not an option"),
        ("[server]\nport = 1", "'server' is not an option"),
        ("[port]\nnumber = 1", "'port' is a table"),
        ("data-dir = 'a'\ndata_dir = 'b'", "is there twice"),
        ("port = ", "cannot be read as TOML"),
        ("port = 70000", "65535"),
        ("port = 'many'", "'--port': Input should be a valid integer"),
        ("host = '0.0.0.0'", "--allow-remote"),
        ("checkpoint = 'gone.safetensors'", "does not exist"),
    ],
)
def test_a_mistake_in_the_file_is_an_error_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "wan.toml"
    file.write_text(text)
    result = invoke("--config", str(file), "--data-dir", str(tmp_path / "data"))
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not (tmp_path / "data").exists()


def test_the_example_file_of_the_guide_is_read(root: Path, tmp_path: Path) -> None:
    guide = (root / "docs/serving.md").read_text()
    text = guide.partition("```toml\n")[2].partition("```")[0]
    file = tmp_path / "wan-serve.toml"
    file.write_text(text)
    shutil.copytree(root / "models/tiny/transformer", tmp_path / "models/tiny")
    (tmp_path / "keys.json").write_text('{"keys": []}')
    told = dry(file)
    assert f"asked for, from {tmp_path / 'keys.json'}" in told
