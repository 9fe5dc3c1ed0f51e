"""No fault that information in the file can tell is accepted, and no file without a fault is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.builders.files import Content
from tests.faults import ggml, kinds, matrix
from tests.faults.kinds import File
from tests.faults.trained import trained
from wan_runtime.dialects import DIALECTS

pytestmark = pytest.mark.slow


def short(cases: list[tuple[str, str]]) -> list[object]:
    """The cases: of each dialect the first two formats in every run, the others in the long one."""
    seen: Counter[str] = Counter()
    marked: list[object] = []
    for case in cases:
        seen[case[0]] += 1
        marked.append(pytest.param(*case, marks=[pytest.mark.long] if seen[case[0]] > 2 else []))
    return marked


@pytest.mark.parametrize(("dialect", "weight_format"), short(matrix.CASES))
def test_every_fault_that_can_be_told_is_read_right_or_refused(
    tmp_path: Path, dialect: str, weight_format: str
) -> None:
    torch.set_num_threads(1)
    counts = matrix.run(dialect, weight_format, tmp_path, flips=8)
    assert matrix.wrong(counts) == {}
    assert counts["intact", "read"] == 1
    assert counts["flip a code's lowest bit", "wrong"] == 1  # so "wrong" can be found at all


def test_every_dialect_is_in_the_matrix() -> None:
    assert {dialect for dialect, _ in matrix.CASES} == set(DIALECTS)


SHOWN = {
    kinds: (("comfy", "nvfp4"), ("modelopt", "fp8"), ("plain", "bf16")),
    ggml: (("gguf", "ggml_q8_0"), ("gguf", "ggml_q5_1")),
}


@pytest.mark.parametrize(
    ("of", "name"), [(of, name) for of in SHOWN for name in (*of.TELLABLE, *of.UNTELLABLE)]
)
def test_a_fault_changes_the_file(of: ModuleType, name: str) -> None:
    """In one dialect at least; a fault that changed nothing would pass for a file read right."""
    changed = 0
    for dialect, weight_format in SHOWN[of]:
        truth = trained(dialect, weight_format)
        for content in {**of.TELLABLE, **of.UNTELLABLE}[name](File(truth, dialect, weight_format)):
            assert _bytes(content) != _bytes(truth)
            changed += 1
    assert changed


def _bytes(content: Content) -> dict[str, tuple[torch.Size, bytes]]:
    return {
        key: (tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for key, tensor in content.tensors.items()
    }


def test_the_table_counts_what_is_wrong() -> None:
    answers = [
        ("intact", "refused"),
        ("drop", "wrong"),
        ("drop", "refused"),
        ("flip a code's lowest bit", "wrong"),
    ]
    counts = Counter(dict(zip(answers, (1, 2, 3, 4), strict=True)))
    assert matrix.wrong(counts) == {"intact": "refused", "drop": "wrong"}
    assert "| `x` | `y` | 10 | 0 | 3 | 3 | 4 |" in matrix.table({("x", "y"): counts})
