"""One package over three root folders: right as a wheel, an sdist, editable and from the checkout; and `make`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

FOLDERS = {
    "wan_runtime/patches": "../patches",
    "wan_runtime/serve": "../serve",
    "wan_runtime/tiny": "../models/tiny",
}
NOT_SHIPPED = {"wan_runtime.tiny.train"}  # the training code: run from a checkout only
PROBE = "import wan_runtime, wan_runtime.patches, wan_runtime.serve, wan_runtime.serve.endpoints, wan_runtime.tiny"
LEFT_BEHIND = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".whl",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".coverage*",
    "docs",
    "demo.mp4",
)


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that has to succeed, free of this process's import paths."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}{done.stderr}"
    return done.stdout


def empty_venv(folder: Path) -> Path:
    """A new environment that sees this one's dependencies but not this one's wan_runtime; returns its python.

    A .pth line puts the directory on the path without reading the .pth files in it, which is where an editable
    install of wan_runtime would be.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-c", "import torch", cwd=folder)
    return python


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install")
    run(*pip, "--quiet", "--no-deps", "--no-build-isolation", *what, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A copy of the checkout, symlinks kept, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "wan-runtime"
    shutil.copytree(root, copy, symlinks=True, ignore=LEFT_BEHIND)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel that `python -m build` makes: from the sdist, never from the checkout."""
    out = source.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source.parent)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The python of an environment that holds the wheel."""
    python = empty_venv(wheel.parent.parent / "venv-wheel")
    install(python, wheel, cwd=wheel.parent)
    return python


def test_the_package_list_is_the_directories(root: Path) -> None:
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    held = {
        ".".join(Path(folder).relative_to(root).parts)
        for folder, _, files in os.walk(root / "wan_runtime", followlinks=True)
        if "__init__.py" in files
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == held - NOT_SHIPPED


def test_the_checkout_links_are_relative(root: Path) -> None:
    assert {link: os.readlink(root / link) for link in FOLDERS} == FOLDERS


def test_the_wheel_holds_every_module_and_the_tiny_model(wheel: Path, source: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {
        str(Path(folder).relative_to(source) / name)
        for folder, _, files in os.walk(source / "wan_runtime", followlinks=True)
        for name in files
        if name.endswith(".py") and "/train" not in folder
    }
    tiny = source / "models" / "tiny"
    data = {
        str(Path("wan_runtime/tiny") / path.relative_to(tiny))
        for path in tiny.rglob("*")
        if path.suffix in {".json", ".safetensors", ".model"} and "train" not in path.relative_to(tiny).parts
    }
    web = {
        f"wan_runtime/{p.relative_to(source)}" for p in (source / "serve" / "web").rglob("*") if p.is_file()
    }
    assert held == modules | data | web | {"wan_runtime/py.typed"}


@pytest.mark.slow
def test_the_wheel_works_from_anywhere(installed: Path, tmp_path: Path) -> None:
    found = run(installed, "-c", f"{PROBE}; print(wan_runtime.__file__)", cwd=tmp_path).strip()
    assert Path(found).is_relative_to(installed.parent.parent)
    assert "inspect" in run(installed.parent / "wan-runtime", "--help", cwd=tmp_path)
    assert "--checkpoint" in run(installed.parent / "wan-serve", "--help", cwd=tmp_path)


def test_the_wheel_carries_the_tiny_model(installed: Path, tmp_path: Path) -> None:
    code = "from wan_runtime import tiny; print((tiny.path() / 'model_index.json').is_file())"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "True"


def test_the_wheel_leaves_the_top_level_alone(installed: Path, tmp_path: Path) -> None:
    """`patches`, `serve`, `models` and `tests` are names of user files too: none of them is installed."""
    code = "import importlib.util as u; print([n for n in ('patches', 'serve', 'models', 'tests') if u.find_spec(n)])"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "[]"


def test_the_installed_wheel_run_inside_the_checkout(installed: Path, source: Path) -> None:
    """There the checkout's wan_runtime shadows the installed one: only the symlinks make it whole."""
    found = run(installed, "-c", f"{PROBE}; print(wan_runtime.patches.__file__)", cwd=source).strip()
    assert found.startswith(str(source))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [(), pytest.param(("--config-settings", "editable_mode=strict"), marks=pytest.mark.long)],
    ids=["default", "strict"],
)
def test_an_editable_install(source: Path, tmp_path: Path, mode: tuple[str, ...]) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(source, copy, symlinks=True, ignore=LEFT_BEHIND)
    python = empty_venv(tmp_path / "venv")
    install(python, *mode, "--editable", copy, cwd=tmp_path)
    for cwd in (tmp_path, copy):
        run(python, "-c", PROBE, cwd=cwd)
    assert "--checkpoint" in run(python.parent / "wan-serve", "--help", cwd=tmp_path)


def test_the_bare_name_is_refused_with_the_remedy(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import patches"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "import wan_runtime.patches" in done.stderr


def test_the_constraints_pin_all_that_make_installs(root: Path) -> None:
    pins = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["diffusers"], *extras["serve"], *extras["dev"]]
    names = {normal(line.partition("==")[0]) for line in pins}
    assert all("==" in line for line in pins)
    assert {normal(want.partition(">")[0].partition("[")[0]) for want in wanted} <= names | {"wan-runtime"}


def normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def planned(checkout: Path, target: str) -> str:
    """The commands that make would run."""
    return run("make", "--dry-run", target, cwd=checkout)


def test_make_sets_up_once_and_again_when_the_pins_change(root: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    for target in ("demo", "serve", "test", "check", "bench"):
        assert "venv --clear .venv" in planned(tmp_path, target), target
    ready = tmp_path / ".venv" / ".ready"
    ready.parent.mkdir()
    ready.touch()
    assert "pip install" not in planned(tmp_path, "test")
    newer = ready.stat().st_mtime + 10
    for name in ("pyproject.toml", "constraints.txt"):
        before = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (newer, newer))
        assert "pip install" in planned(tmp_path, "test"), name
        os.utime(tmp_path / name, (before, before))


def test_continuous_integration_runs_what_people_run(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"
