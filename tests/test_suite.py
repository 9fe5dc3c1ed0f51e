"""benchmarks/suite.py's file: what a later start on another machine leaves in it, and the ratios made of that."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BASE, OURS, PEER = "diffusers bf16 cudnn compiled", "ours fp8 fa3", "torchao fp8 fa3 compiled"


def row(config: str, seconds: float) -> dict[str, Any]:
    return {"model": "14B 480p", "config": config, "step_s": seconds, "first_s": seconds}


@pytest.fixture
def suite(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("suite")


def test_a_later_starts_rows_never_take_an_earlier_ones_place(suite: Any, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    suite.keep(file, forward=[row(BASE, 4.0), row(OURS, 2.0)])
    for seconds in (9.0, 3.0):  # the same start twice: its own rows are replaced
        later = [row(OURS, seconds), row(PEER, seconds)]
        suite.keep(file, **suite.of_start(2, later, suite.load(file)))
    kept = suite.load(file)
    assert kept["forward"] == [row(BASE, 4.0), row(OURS, 2.0), row(PEER, 3.0) | {"run": 2}]
    assert kept["again"] == [row(OURS, 3.0) | {"run": 2}]


def test_a_ratio_is_to_the_base_of_the_same_start_where_that_ran_it(suite: Any) -> None:
    showing = importlib.import_module("showing")
    rows = [row(BASE, 4.0), row(OURS, 2.0), row(PEER, 3.0) | {"run": 2}]
    slower = row(BASE, 5.0) | {"run": 2}
    assert "FA3, compiled <sup>2</sup> | 3.000 s | 0.600 |" in showing.table(rows, [slower])
    assert "FA3, compiled <sup>2</sup> | 3.000 s | 0.750 |" in showing.table(rows, [])
    assert "**ours: FP8, FA3** | **2.000 s** | 0.500 |" in showing.table(rows, [slower])


def test_a_file_of_some_configurations_is_shown_without_ratios(suite: Any) -> None:
    showing = importlib.import_module("showing")
    assert "| **2.000 s** | not measured |" in showing.table([row(OURS, 2.0)], [])


def test_a_later_start_does_not_replace_the_machines_ceilings(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["suite.py", str(tmp_path / "card.json"), "--run", "2", "--linear"])
    with pytest.raises(SystemExit):
        suite.main()
    assert "--run is for forwards" in capsys.readouterr().err
