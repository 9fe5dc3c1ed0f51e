"""Imports run one way: what import-linter's static graph cannot see, and what importing the library may load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

# Runs in a process of its own, from the repository's root. The package is a bare shell with the real path, so that
# wan_runtime/__init__.py (which sits above every layer) pulls nothing in. Layers are loaded from the lowest up, each
# with all of its modules: a higher one that has appeared by then was imported by a lower one.
CLIMB = """
import importlib, json, pkgutil, sys, types
package = types.ModuleType("wan_runtime")
package.__path__ = ["wan_runtime"]
sys.modules["wan_runtime"] = package

def load(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        return
    inner = () if name == "wan_runtime.tiny" else getattr(module, "__path__", ())  # its scripts use the library
    for info in pkgutil.iter_modules(inner):
        if not info.name.startswith("__"):
            load(f"{name}.{info.name}")

layers = json.load(sys.stdin)
climbed, wrong = set(), []
for layer in layers:
    climbed.update(layer)
    for name in layer:
        load(f"wan_runtime.{name}")
    loaded = {name.split(".")[1] for name in sys.modules if name.startswith("wan_runtime.")}
    wrong += [f"{' / '.join(layer)} loaded {name}" for name in sorted(loaded - climbed)]
print(json.dumps(wrong))
"""

# A kernel or backend file may need one of these at its top: it is imported only where the wheel is there.
OPTIONAL = ("triton", "transformer_engine")
LAZY = ("transformer_engine", "triton", "diffusers", "transformers")


def layers_of(root: Path) -> list[list[str]]:
    """The layers of the import-linter contract, lowest first; modules of one layer together."""
    contract = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    lines = [[name.strip() for name in line.split(":")] for line in contract["layers"]]
    return list(reversed(lines))


def run(root: Path, code: str, *, stdin: str = "") -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=root, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_no_layer_loads_a_higher_one(root: Path) -> None:
    *lower, _top = layers_of(root)  # nothing is above the top one, and it uses what the bare shell lacks
    assert json.loads(run(root, f"OPTIONAL = {OPTIONAL!r}\n{CLIMB}", stdin=json.dumps(lower))) == []


def test_every_layer_of_the_contract_exists(root: Path) -> None:
    missing = [
        name
        for layer in layers_of(root)
        for name in layer
        if not (root / "wan_runtime" / name).is_dir() and not (root / "wan_runtime" / f"{name}.py").is_file()
    ]
    assert missing == []


@pytest.mark.parametrize(
    "statement", ["import wan_runtime", "import wan_runtime.serve", "import wan_runtime.patches"]
)
def test_importing_the_library_is_light(root: Path, statement: str) -> None:
    code = f"""
import json, sys
{statement}
import torch
print(json.dumps([torch.cuda.is_initialized(), [name for name in {LAZY!r} if name in sys.modules]]))
"""
    initialised, loaded = json.loads(run(root, code))
    assert not initialised, f"{statement} started CUDA"
    assert loaded == []


def imports_of(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each absolute import in a file; a relative one is resolved against its package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            yield from ((module, alias.name) for alias in node.names)


def test_the_server_uses_the_public_names_only(root: Path) -> None:
    public = public_names(root)
    allowed = ("wan_runtime.serve", "wan_runtime.tiny")  # the tiny model is data
    wrong = []
    for path in sorted((root / "serve").rglob("*.py")):
        package = ".".join(["wan_runtime", *path.relative_to(root).parent.parts])
        for module, name in imports_of(path, package):
            inner = module.startswith("wan_runtime.") and not module.startswith(allowed)
            private = module == "wan_runtime" and name not in {*public, "serve", "tiny"}
            if inner or (private and name):
                wrong.append(f"{path.relative_to(root)}: {module} {name}")
    assert wrong == []


def public_names(root: Path) -> set[str]:
    """What wan_runtime/__init__.py declares as public."""
    import wan_runtime

    assert Path(wan_runtime.__file__).parent == root / "wan_runtime", (
        "the tests read another copy of the library"
    )
    return set(wan_runtime.__all__)
