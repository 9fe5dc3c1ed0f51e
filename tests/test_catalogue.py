"""The catalogue: what it lists, when it imports, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from wan_runtime.catalogue import Catalogue
from wan_runtime.errors import UnknownName


@dataclass(frozen=True)
class Colour:
    name: str


MODULE = "from tests.test_catalogue import Colour\nCOLOUR = Colour({name!r})\n"


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of three colours, one of them private."""
    package = tmp_path / "colours"
    package.mkdir()
    for name in ("red", "dark_blue", "_mixing"):
        (package / f"{name}.py").write_text(MODULE.format(name=name))
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [module for module in sys.modules if module.split(".")[0] == "colours"]:
        del sys.modules[name]


def test_a_file_is_an_entry_and_its_name_the_key(colours: Path) -> None:
    catalogue = Catalogue("colours", Colour)
    assert list(catalogue) == ["dark_blue", "red"]
    assert len(catalogue) == 2
    assert catalogue["red"] == Colour("red")
    assert {name: record.name for name, record in catalogue.items()} == {
        "dark_blue": "dark_blue",
        "red": "red",
    }


def test_names_as_users_type_them_are_found(colours: Path) -> None:
    assert Catalogue("colours", Colour)["dark-blue"] == Colour("dark_blue")


def test_a_new_file_is_a_new_entry(colours: Path) -> None:
    (colours / "green.py").write_text(MODULE.format(name="green"))
    assert list(Catalogue("colours", Colour)) == ["dark_blue", "green", "red"]


def test_listing_imports_no_entry(colours: Path) -> None:
    catalogue = Catalogue("colours", Colour)
    assert "red" in catalogue and "mauve" not in catalogue
    assert list(catalogue)
    assert "colours.red" not in sys.modules
    catalogue["red"]
    assert "colours.red" in sys.modules and "colours.dark_blue" not in sys.modules


@pytest.mark.parametrize("name", ["mauve", "_mixing", "", "red.hot", "__init__"])
def test_an_unknown_name_lists_the_known_ones(colours: Path, name: str) -> None:
    catalogue = Catalogue("colours", Colour)
    with pytest.raises(UnknownName, match=r"There is no colour named .*Known: dark_blue, red\.") as caught:
        catalogue[name]
    assert (caught.value.kind, caught.value.name, caught.value.known) == (
        "colour",
        name,
        ("dark_blue", "red"),
    )
    assert isinstance(caught.value, KeyError)
    assert catalogue.get(name) is None


def test_a_broken_entry_is_a_defect_and_not_an_absence(colours: Path) -> None:
    (colours / "broken.py").write_text("import no_such_library\n")
    (colours / "other.py").write_text("COLOUR = 'red'\n")
    catalogue = Catalogue("colours", Colour)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        catalogue["broken"]
    with pytest.raises(TypeError, match=r"colours\.other\.COLOUR is not a Colour"):
        catalogue["other"]


@pytest.mark.parametrize("package", ["containers", "formats", "dialects", "names", "backends", "patches"])
def test_every_entry_of_the_library_loads_under_its_own_name(package: str) -> None:
    import importlib

    module = importlib.import_module(f"wan_runtime.{package}")
    own = f"wan_runtime.{package}"
    [catalogue] = [v for v in vars(module).values() if isinstance(v, Catalogue) and v.package == own]
    assert len(catalogue) > 0
    assert all(isinstance(record, catalogue.kind) for record in catalogue.values())


def test_importing_a_catalogue_imports_none_of_its_entries() -> None:
    code = "import sys, wan_runtime.dialects; print(*(m for m in sys.modules if m.startswith('wan_runtime.dialects.')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in run.stdout.split() if not name.startswith("wan_runtime.dialects._")] == []
