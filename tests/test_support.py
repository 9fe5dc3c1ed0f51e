"""docs/support.md says what the backends' rules say, and what this machine shows of them."""

from __future__ import annotations

import pytest
import torch

from tests.support import KINDS, MARK, PAGE, cell, tables, word
from wan_runtime.backends import BACKENDS, backend_named
from wan_runtime.doctor import IN, OUT
from wan_runtime.errors import BackendUnavailable
from wan_runtime.formats import FORMATS
from wan_runtime.plan import Options, choose

CPU = next(kind for kind in KINDS if kind.name == "CPU")


def test_the_page_is_what_the_rules_say_today() -> None:
    assert MARK in PAGE.read_text()
    assert PAGE.read_text().partition(MARK)[2] == tables().removeprefix(MARK), "run: python -m tests.support"


def test_every_way_and_every_kind_of_evidence_is_told_apart() -> None:
    cells = {
        cell(kind, name, BACKENDS[module].name) for kind in KINDS for name in FORMATS for module in BACKENDS
    }
    assert cells == {
        "native, run", "native, modelled", "native, claimed", "expanded, run", "expanded, claimed",
        "stored only, run", "stored only, modelled", "stored only, claimed", "refused",
    }  # fmt: skip


@pytest.mark.parametrize("module", BACKENDS)
def test_the_cpus_cells_are_what_this_cpu_does(module: str) -> None:
    backend = backend_named(BACKENDS[module].name)
    for name in FORMATS:
        if cell(CPU, name, backend.name) == "refused":
            with pytest.raises(BackendUnavailable):
                choose(name, CPU.device, (OUT, IN), Options(backend=backend.name))
            continue
        _, compute, _ = choose(name, CPU.device, (OUT, IN), Options(backend=backend.name))
        assert cell(CPU, name, backend.name) == f"{word(name, compute)}, run"
        slots = FORMATS[name].quantize(torch.randn(OUT, IN), True)
        assert backend.kernel(name, compute)(torch.randn(2, IN), slots, None).shape == (2, OUT)
