"""The import hook and its doors: every way a script can get a WAN model gives a patched one, and undo is whole."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

import wan_runtime
from tests.builders import files
from tests.builders.wan import block_linears, state
from tests.hosts.diffusers import checkpoint, error, run, transformer
from wan_runtime.arming import install, run_script
from wan_runtime.errors import AmbiguousDialect, CheckpointError, InvalidOption, NothingToPatch
from wan_runtime.experts import Armed
from wan_runtime.report import Report
from wan_runtime.swap import patched_state

Arm = Callable[..., Armed]


@pytest.fixture
def arm() -> Iterator[Arm]:
    """`install` without printing; undone at the end of the test."""
    handles: list[Armed] = []

    def armed(**options: Any) -> Armed:
        handles.append(install(options, announce=lambda report: None))
        return handles[-1]

    doors = dict(WanTransformer3DModel.__dict__)
    hooks = list(sys.meta_path)
    yield armed
    for handle in handles:
        handle.undo()
    assert dict(WanTransformer3DModel.__dict__) == doors, "undo left something on the class"
    assert sys.meta_path == hooks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with two experts, as diffusers saves them."""
    folder = tmp_path_factory.mktemp("pipeline")
    transformer().save_pretrained(folder / "transformer")
    transformer(seed=1).save_pretrained(folder / "transformer_2")
    return folder


@pytest.fixture(scope="module")
def truth() -> dict[int, torch.Tensor]:
    """What each seed's model computes in fp32, found before any class is armed."""
    return {seed: run(transformer(seed=seed)) for seed in (0, 3, 4)}


def from_pretrained(folder: Path, name: str = "transformer") -> Any:
    return WanTransformer3DModel.from_pretrained(str(folder), subfolder=name or None)


def test_from_pretrained_gives_a_patched_model(arm: Arm, saved: Path) -> None:
    armed = arm(weights="nvfp4", skip=("blocks.0.*",))
    for where in (saved, saved / "transformer"):  # with a subfolder, and without
        model = from_pretrained(where, "transformer" if where is saved else "")
        report = wan_runtime.patch(model)
        assert report.already and {d.format for d in report.quantised} == {"nvfp4"}
        assert len(report.quantised) == 10
    assert len(armed.reports) == 2
    run(model, torch.bfloat16)
    assert len(armed.reports) == 2, "the first call patched it again"
    armed.undo()
    assert patched_state(from_pretrained(saved)) is None
    assert patched_state(model) is not None


def test_a_checkpoint_is_loaded_in_place_of_weights_that_need_not_be_there(
    arm: Arm, saved: Path, tmp_path: Path, truth: dict[int, torch.Tensor]
) -> None:
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((saved / "transformer" / "config.json").read_text())
    arm(checkpoint=checkpoint(tmp_path / "file.safetensors", seed=3), weights="keep")
    model = from_pretrained(folder.parent)
    assert not model.training and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert error(run(model, torch.bfloat16), truth[3]) < 0.03


def test_each_expert_gets_its_own_file(
    arm: Arm, saved: Path, tmp_path: Path, truth: dict[int, torch.Tensor]
) -> None:
    high = checkpoint(tmp_path / "high.safetensors", seed=3)
    low = checkpoint(tmp_path / "low.safetensors", seed=4)
    armed = arm(checkpoint=high, checkpoint_low=low, weights="fp8")
    second = from_pretrained(saved, "transformer_2")
    assert armed.unused() == [high]
    first = from_pretrained(saved)
    assert [r.checkpoint for r in armed.reports] == [str(low), str(high)] and armed.unused() == []
    assert error(run(first, torch.bfloat16), truth[3]) < 0.05
    assert error(run(second, torch.bfloat16), truth[4]) < 0.05


def test_two_experts_and_one_file_is_an_error(arm: Arm, saved: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "high.safetensors")
    arm(checkpoint=path)
    with pytest.raises(InvalidOption, match="checkpoint_low"):
        from_pretrained(saved, "transformer_2")
    with pytest.raises(InvalidOption, match="without checkpoint"):
        arm(checkpoint_low=path)


Experts = tuple[Path, Path]


@pytest.fixture
def experts(tmp_path: Path) -> Experts:
    """A file for each expert, to be given as checkpoint and checkpoint_low."""
    return checkpoint(tmp_path / "high.safetensors", seed=3), checkpoint(tmp_path / "low.safetensors", seed=4)


def from_file(path: Path, **options: Any) -> Any:
    return WanTransformer3DModel.from_single_file(str(path), **options)


def build() -> Any:
    """A model that the script fills itself and that is patched by its first call."""
    model = transformer()
    run(model, torch.bfloat16)
    return model


def taken(armed: Armed) -> list[str]:
    return [Path(str(report.checkpoint)).stem for report in armed.reports]


@pytest.mark.parametrize("first", ["folder", "file", "built"])
@pytest.mark.parametrize("second", ["folder", "file", "built"])
def test_a_second_source_never_gets_the_first_ones_file(
    arm: Arm, saved: Path, tmp_path: Path, experts: Experts, first: str, second: str
) -> None:
    """Names that tell nothing, through every pair of doors: one file is refused, two are one each, in order."""
    other = tmp_path / "wan-b"
    other.mkdir()
    (other / "config.json").write_text((saved / "transformer" / "config.json").read_text())
    doors: list[dict[str, Callable[[], Any]]] = [
        {"folder": lambda: from_pretrained(saved), "file": lambda: from_file(tmp_path / "a.safetensors")},
        {"folder": lambda: from_pretrained(other, ""), "file": lambda: from_file(tmp_path / "b.safetensors")},
    ]
    armed = arm(checkpoint=experts[0], weights="fp8")
    doors[0].get(first, build)()
    with pytest.raises(InvalidOption, match=r"in place of .*--checkpoint-low"):
        doors[1].get(second, build)()
    assert taken(armed) == ["high"]
    armed = arm(checkpoint=experts[0], checkpoint_low=experts[1], weights="fp8")
    doors[0].get(first, build)(), doors[1].get(second, build)()
    assert taken(armed) == ["high", "low"]
    with pytest.raises(InvalidOption, match=r"low\.safetensors is in place of .* already"):
        build()


def test_a_source_loaded_again_is_the_same_expert(
    arm: Arm, saved: Path, tmp_path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed = arm(checkpoint=experts[0], weights="fp8")
    from_pretrained(saved), from_pretrained(saved / "transformer", "")
    monkeypatch.chdir(saved)
    from_pretrained(Path("transformer"), "")
    assert taken(armed) == ["high"] * 3
    armed = arm(checkpoint=experts[0], checkpoint_low=experts[1], weights="fp8")
    for name in ("a", "b", "a", "b"):
        from_file(tmp_path / f"{name}.safetensors")
    assert taken(armed) == ["high", "low", "high", "low"]


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        ("wan2.2_t2v_low_noise_14B.safetensors", "wan2.2_t2v_high_noise_14B.safetensors", {}),
        ("Wan2.2-LowNoise.safetensors", "other.safetensors", {}),
        ("low_noise_model/model.safetensors", "high_noise_model/model.safetensors", {}),
        ("a.safetensors", "b.safetensors", {"subfolder": "transformer_2"}),
    ],
)
def test_a_file_that_names_its_expert_is_believed_before_the_order(
    arm: Arm, tmp_path: Path, experts: Experts, first: str, second: str, options: dict[str, str]
) -> None:
    armed = arm(checkpoint=experts[0], checkpoint_low=experts[1], weights="fp8")
    from_file(tmp_path / first, **options), from_file(tmp_path / second)
    assert taken(armed) == ["low", "high"]


def test_one_file_serves_a_script_that_loads_the_low_noise_expert_alone(
    arm: Arm, tmp_path: Path, experts: Experts
) -> None:
    armed = arm(checkpoint=experts[1], weights="fp8")
    from_file(tmp_path / "wan2.2_low_noise.safetensors")
    assert taken(armed) == ["low"]
    with pytest.raises(InvalidOption, match="--checkpoint-low"):
        from_file(tmp_path / "wan2.2_high_noise.safetensors")


def test_a_load_that_failed_took_no_expert(arm: Arm, saved: Path, tmp_path: Path, experts: Experts) -> None:
    armed = arm(checkpoint=experts[0], checkpoint_low=experts[1], weights="fp8")
    with pytest.raises(OSError, match="missing"):
        from_pretrained(tmp_path / "missing", "")
    from_pretrained(saved)
    assert taken(armed) == ["high"]


def test_without_checkpoints_any_number_of_models_keep_their_own_weights(arm: Arm, saved: Path) -> None:
    armed = arm(weights="fp8")
    from_pretrained(saved), from_pretrained(saved, "transformer_2"), build(), build()
    assert len(armed.reports) == 4


def test_a_file_that_cannot_be_read_is_refused_at_once(arm: Arm, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        arm(checkpoint=tmp_path / "missing.safetensors")
    content = files.modelopt(state(), block_linears(), "nvfp4")
    content.config = None  # without it the nibble order is anyone's guess
    path = content.write(tmp_path)
    with pytest.raises(AmbiguousDialect):
        arm(checkpoint=path)
    arm(checkpoint=path, dialect="modelopt")


def test_from_single_file_reads_what_diffusers_would_drop(
    arm: Arm, tmp_path: Path, truth: dict[int, torch.Tensor]
) -> None:
    content = files.comfy_scaled_fp8(state(), block_linears(), "fp8")
    armed = arm(compute="bf16")
    model = WanTransformer3DModel.from_single_file(str(content.write(tmp_path)), torch_dtype=torch.float32)
    assert armed.reports[0].dialect == "comfy_scaled_fp8"
    assert error(run(model), truth[0]) < 0.05
    with pytest.raises(InvalidOption, match="local files only"):
        WanTransformer3DModel.from_single_file("https://example.org/model.safetensors")


def test_a_constructed_model_is_patched_before_its_first_hook(
    arm: Arm, truth: dict[int, torch.Tensor]
) -> None:
    armed = arm()
    model = transformer()
    assert patched_state(model) is None
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(patched_state(module) is not None))
    assert error(run(model, torch.bfloat16), truth[0]) < 0.04
    run(model, torch.bfloat16)
    assert seen == [True, True] and len(armed.reports) == 1


def test_experts_that_are_constructed_get_their_files_in_the_order_of_sampling(
    arm: Arm, tmp_path: Path
) -> None:
    high = checkpoint(tmp_path / "high.safetensors", seed=3)
    low = checkpoint(tmp_path / "low.safetensors", seed=4)
    armed = arm(checkpoint=high, checkpoint_low=low, weights="fp8")
    first, second = transformer(), transformer()
    run(first, torch.bfloat16), run(second, torch.bfloat16)
    assert [r.checkpoint for r in armed.reports] == [str(high), str(low)]


def test_installing_again_replaces(arm: Arm, saved: Path) -> None:
    first, second = arm(weights="nvfp4"), arm(weights="fp8")
    model = from_pretrained(saved)
    assert (len(first.reports), len(second.reports)) == (0, 1)
    assert {d.format for d in wan_runtime.patch(model).quantised} == {"fp8"}
    first.undo()  # too late to matter
    assert patched_state(from_pretrained(saved)) is not None


def test_undo_twice(arm: Arm) -> None:
    armed = arm()
    armed.undo()
    armed.undo()


MODULE = '''
"""Stands where the original release keeps its model."""
from tests.hosts.original import WanModel as Tree

class WanModel(Tree):
    pass
'''


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable `wan.modules.model`, not imported yet."""
    folder = tmp_path / "wan" / "modules"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder / "model.py"
    for name in [n for n in sys.modules if n == "wan" or n.startswith("wan.")]:
        del sys.modules[name]


def test_a_class_is_armed_when_it_is_imported(arm: Arm, release: Path) -> None:
    armed = arm()
    assert "wan.modules.model" not in sys.modules
    module: Any = importlib.import_module("wan.modules.model")
    assert "__call__" in module.WanModel.__dict__
    assert (
        type(module.__loader__).__name__ == "SourceFileLoader" and module.__spec__.loader is module.__loader__
    )
    assert inspect.getsource(module.WanModel).startswith("class WanModel")
    armed.undo()
    assert "__call__" not in module.WanModel.__dict__


def test_a_class_imported_after_undo_is_left_alone(arm: Arm, release: Path) -> None:
    arm().undo()
    assert "__call__" not in importlib.import_module("wan.modules.model").WanModel.__dict__


def test_a_release_without_the_class_warns(arm: Arm, release: Path) -> None:
    release.write_text("Other = 1\n")
    arm()
    with pytest.warns(UserWarning, match=r"wan\.modules\.model has no WanModel"):
        importlib.import_module("wan.modules.model")


def test_a_broken_module_fails_as_it_would(arm: Arm, release: Path) -> None:
    release.write_text("raise ValueError('its own')\n")
    arm()
    with pytest.raises(ValueError, match="its own"):
        importlib.import_module("wan.modules.model")


SCRIPT = """
import json, sys
from diffusers import WanTransformer3DModel
import beside
model = WanTransformer3DModel.from_pretrained(sys.argv[1])
print(json.dumps([__name__, sys.argv, beside.HERE, str(model.dtype)]))
"""


def write(folder: Path, text: str) -> Path:
    (folder / "beside.py").write_text("HERE = True\n")
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.fixture
def clean() -> Iterator[None]:
    """Scripts leave the process as they found it."""
    before = sys.argv[:], sys.path[:], sys.meta_path[:], dict(WanTransformer3DModel.__dict__)
    yield
    assert (sys.argv, sys.path, sys.meta_path, dict(WanTransformer3DModel.__dict__)) == before
    sys.modules.pop("beside", None)


@pytest.mark.usefixtures("clean")
def test_a_script_runs_as_python_would_run_it(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write(tmp_path, SCRIPT)
    folder = str(saved / "transformer")
    run_script(script, [folder, "--flag"], {"weights": "nvfp4"})
    out, err = capsys.readouterr()
    assert json.loads(out) == ["__main__", [str(script), folder, "--flag"], True, "torch.bfloat16"]
    assert "nvfp4" in err and "wan_diffusers on" in err


@pytest.mark.usefixtures("clean")
def test_a_script_without_a_wan_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingToPatch, match=r"ended without loading a WAN model.*WanTransformer3DModel"):
        run_script(write(tmp_path, "print('no model')"))


@pytest.mark.usefixtures("clean")
def test_a_checkpoint_that_no_model_took_is_an_error(saved: Path, tmp_path: Path) -> None:
    high, low = (checkpoint(tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("high", "low")))
    with pytest.raises(InvalidOption, match=r"loaded no model for .*low\.safetensors"):
        run_script(
            write(tmp_path, SCRIPT), [str(saved / "transformer")],
            {"checkpoint": high, "checkpoint_low": low, "weights": "fp8"},
        )  # fmt: skip


@pytest.mark.usefixtures("clean")
def test_a_scripts_own_error_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(write(tmp_path, "1 / 0"))
    with pytest.raises(SystemExit):
        run_script(write(tmp_path, "raise SystemExit(3)"))


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("code", ["", "0", "None"])
def test_a_script_that_exits_well_is_checked_too(saved: Path, tmp_path: Path, code: str) -> None:
    with pytest.raises(NothingToPatch, match="ended without loading a WAN model"):
        run_script(write(tmp_path, f"import sys\nsys.exit({code})"))
    script = write(tmp_path, f"{SCRIPT}\nsys.exit({code})")
    high, low = (checkpoint(tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("high", "low")))
    options = {"checkpoint": high, "checkpoint_low": low, "weights": "fp8"}
    with pytest.raises(InvalidOption, match=r"loaded no model for .*low\.safetensors"):
        run_script(script, [str(saved / "transformer")], options)
    with pytest.raises(SystemExit) as ended:
        run_script(script, [str(saved / "transformer")], {"weights": "fp8"})
    assert ended.value.code in (None, 0)


def test_reports_are_announced(saved: Path) -> None:
    heard: list[Report] = []
    armed = install(announce=heard.append)
    try:
        from_pretrained(saved)
    finally:
        armed.undo()
    assert heard == armed.reports and len(heard) == 1
