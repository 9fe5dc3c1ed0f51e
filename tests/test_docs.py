"""What the prose points at exists: links between pages, files named in code, and make targets."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

PAGES = sorted(path.name for path in Path(__file__).resolve().parent.parent.glob("*.md"))


def sources(root: Path, *endings: str) -> list[Path]:
    """The repository's own files with one of these endings, hidden and made folders left out."""
    folders = ("wan_runtime", "patches", "serve", "tests", "examples", "benchmarks", "docs", "models")
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in endings]
    return sorted({path.resolve() for path in [*found, *root.glob("*.md")]})


def test_every_link_of_a_page_leads_somewhere(root: Path) -> None:
    broken = []
    for page in sources(root, ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(root)}: {target}")
    assert broken == []


def test_every_page_that_code_names_exists(root: Path) -> None:
    missing = {
        f"{path.relative_to(root)}: {name}"
        for path in sources(root, ".py", ".md")
        for name in re.findall(r"\bdocs/\w[\w-]*\.md\b", path.read_text())
        if not (root / name).is_file()
    }
    assert sorted(missing) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_exists(root: Path, page: str) -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z]+)\b", (root / page).read_text(), flags=re.MULTILINE))
    known = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert named <= set(re.findall(r"^make (\w+)", known, flags=re.MULTILINE))


def test_a_curl_that_writes_a_file_writes_no_error_into_it(root: Path) -> None:
    """Without -f it would save the JSON of an error under the file's name, and succeed."""
    lines = [
        line for path in sources(root, ".md") for line in re.findall(r"^curl .*", path.read_text(), re.M)
    ]
    writing = [line for line in lines if re.search(r" -o\b", line)]
    assert writing and all(re.match(r"curl -\w*f", line) for line in writing)


def test_the_readme_shows_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables and its plot are those of the results beside them, and so is the other card's plot."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    suite, showing = importlib.import_module("suite"), importlib.import_module("showing")
    readme = (root / "README.md").read_text()
    for card, shown in (("h200", True), ("h100", False)):
        results = root / f"benchmarks/results/{card}.json"
        kept = suite.load(results)
        rows = kept["forward"]
        assert rows and (showing.table(rows, kept["again"]) in readme) is shown
        assert showing.plot(rows) == results.with_suffix(".svg").read_text()
