"""`wan-runtime` as a user runs it: results on stdout, one sentence on stderr when it fails, exit status 0, 1 or 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

import wan_runtime
from tests.builders import files, seed, wan
from tests.reading import content
from wan_runtime.cli import app
from wan_runtime.converting import targets

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]
LAYERS = wan.block_linears()
COMMANDS = ("inspect", "compare", "convert", "doctor", "bench", "generate", "run")


@pytest.fixture
def command(root: Path) -> Command:
    """Runs `wan-runtime` in a process of its own, without a terminal."""

    def run(*arguments: object, **environment: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "wan_runtime.cli", *map(str, arguments)],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return files.comfy_scaled_fp8(wan.state(), LAYERS, "fp8").write(tmp_path, "fp8.safetensors")


@pytest.fixture
def undecided(tmp_path: Path) -> Path:
    return seed.broken_nvfp4(wan.state(), LAYERS).write(tmp_path, "undecided.safetensors")


def quick(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit status, stdout, stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_version_is_the_packages(command: Command, root: Path) -> None:
    done = command("--version")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert (done.returncode, done.stdout.strip()) == (0, f"wan-runtime {project['version']}")
    assert wan_runtime.__version__ == project["version"]


def test_help_is_there_and_loads_no_torch(root: Path) -> None:
    code = """
import sys
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner
from wan_runtime.cli import app
print(CliRunner().invoke(app, ["--help"]).stdout)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    status, said, _ = quick(name, "--help")
    assert status == 0
    assert name == "run" or "--json" in said


def test_convert_help_names_every_target() -> None:
    said = " ".join(quick("convert", "--help")[1].replace("│", " ").split())
    assert all(name in said for name in targets())


def test_inspect_prints_a_table_a_file_or_a_list_of_them(fp8: Path, command: Command) -> None:
    done = command("inspect", fp8, fp8)
    assert done.returncode == 0
    assert done.stdout.count("comfy_scaled_fp8") == 2
    assert "20 x fp8" in done.stdout
    status, text, _ = quick("inspect", fp8, "--json")
    [fields] = json.loads(text)
    assert (status, fields["dialect"], fields["formats"]) == (0, "comfy_scaled_fp8", {"fp8": 20})


def test_an_undecided_file_is_shown_and_refused_in_one_sentence_and_read_once_named(
    undecided: Path, command: Command
) -> None:
    done = command("inspect", undecided)
    assert done.returncode == 1
    assert "undecided: 2 dialects fit" in done.stdout and "20 x U8" in done.stdout
    assert done.stderr.startswith(f"wan-runtime: {undecided}: ") and done.stderr.count("\n") == 1
    assert "--dialect comfy or --dialect modelopt" in done.stderr
    assert quick("inspect", undecided, "--dialect", "modelopt")[0] == 0


def test_a_bad_file_does_not_hide_the_others(undecided: Path, fp8: Path) -> None:
    status, text, said = quick("inspect", undecided, fp8)
    assert status == 1
    assert "comfy_scaled_fp8" in text
    assert said.count("wan-runtime: ") == 1
    status, text, _ = quick("inspect", undecided, fp8, "--json")
    first, second = json.loads(text)
    assert (status, second["dialect"]) == (1, "comfy_scaled_fp8")
    assert "--reference" in first["error"] and first["claims"].keys() == {"comfy", "modelopt"}


def test_convert_writes_a_file_and_says_what_it_did(fp8: Path, tmp_path: Path, command: Command) -> None:
    new = tmp_path / "new.safetensors"
    done = command("convert", fp8, new, "--to", "modelopt-fp8", "--names", "diffusers", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert ["exact", "the same format", 20] in report["counts"]
    assert report["bytes_after"] == new.stat().st_size
    info = wan_runtime.inspect(new)
    assert (info.dialect, info.names, dict(info.formats)) == ("modelopt", "diffusers", {"fp8": 20})


def test_convert_takes_dialect_reference_and_keep(undecided: Path, tmp_path: Path) -> None:
    new, reference = (
        tmp_path / "new.safetensors",
        files.Content(wan.state()).write(tmp_path, "reference.safetensors"),
    )
    for settled in (("--dialect", "modelopt"), ("--reference", reference)):
        status, text, said = quick(
            "convert", undecided, new, "--to", "comfy-nvfp4", *settled, "--keep", "blocks.0.*", "--keep",
            "*.ffn.0", "--json",
        )  # fmt: skip
        assert status == 0, said
        assert sum(count for action, _, count in json.loads(text)["counts"] if action == "exact") == 9


def test_compare_prints_the_table_and_json(fp8: Path, undecided: Path) -> None:
    status, text, _ = quick("compare", fp8, undecided)
    assert status == 0
    assert "would look for blocks.0.cross_attn.k.scale_weight" in " ".join(text.split())
    fields = json.loads(
        quick("compare", fp8, undecided, "--errors", "--layer", "blocks.1.ffn.2", "--json")[1]
    )
    assert fields["layer"] == "blocks.1.ffn.2"
    assert fields["errors"]["modelopt"]["blocks.1.ffn.2"] < 0.15


def test_doctor_tries_every_multiplier(command: Command) -> None:
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["facts"]["torch"]
    assert {"fp8", "fp8_e5m2", "nvfp4"} <= {probe["format"] for probe in found["probes"]}
    for probe in found["probes"]:
        assert (probe["error"] is None) != (probe["refusal"] is None)
        assert probe["error"] is None or probe["error"] < 0.1
    exact = [p["error"] for p in found["probes"] if p["backend"] == "reference" and p["device"] == "cpu"]
    assert exact and max(exact) < 1e-5
    assert "This machine" in quick("doctor")[1]


def test_bench_times_every_multiplier_that_serves_against_bf16() -> None:
    small = ("--dim", 32, "--ffn", 64, "--tokens", 16, "--rounds", 3, "--device", "cpu")
    status, text, said = quick("bench", *small, "--json")
    assert status == 0, said
    found = json.loads(text)
    assert {t["linear"] for t in found["timings"]} == {"attention", "ffn.0", "ffn.2", "self-attention"}
    contenders = {t["contender"] for t in found["timings"]}
    assert {"bf16", "torch: fp8 in bf16", "torch: nvfp4 in bf16"} <= contenders
    assert "need a CUDA GPU" in found["refusals"]["torch: fp8 in fp8"]
    assert "sdpa" in contenders and "Hopper" in found["refusals"]["self-attention: fa3"]
    for t in found["timings"]:
        assert t["milliseconds"] > 0
        assert t["contender"] not in ("bf16", "sdpa") or t["speedup"] == 1
    assert quick("bench", *small[:-4], "--rounds", 0)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("convert", "none.safetensors", "new.safetensors", "--to", "bf16"), 1, "there is no such file"),
        (("convert", "FP8", "new.safetensors", "--to", "fp4"), 2, "no conversion target named 'fp4'"),
        (
            ("convert", "FP8", "new.safetensors", "--to", "fp8"),
            2,
            "Did you mean comfy-fp8 or comfy-fp8-scaled",
        ),
        (("convert", "FP8", "FP8", "--to", "bf16"), 2, "is being read"),
        (("convert", "FP8", "/proc/new.safetensors", "--to", "bf16"), 1, ""),
        (("inspect", "none.safetensors"), 1, "there is no such file"),
        (("inspect", "FP8", "--dialect", "kohya"), 2, "no dialect named 'kohya'"),
        (("generate", "--prompt", "a cat", "--output", "clip.avi"), 2, "must end in .mp4"),
        (("generate", "--prompt", "a cat", "--output", "/none/clip.mp4"), 2, "a folder that exists"),
        (("generate", "--prompt", "a cat", "--size", "big"), 2, "WIDTHxHEIGHT"),
        (("generate", "--prompt", "a cat", "--dtype", "int8"), 2, "choose from bfloat16"),
        (("generate", "--prompt", "a cat", "--checkpoint", "none.safetensors"), 1, "there is no such file"),
        (
            ("generate", "--prompt", "a cat", "--checkpoint", "none.safetensors", "--device", "foo"),
            2,
            "device 'foo' cannot be used",
        ),
        (("convert", "FP8", "new.safetensors", "--to", "bf16", "--device", "foo"), 2, "device 'foo' cannot"),
    ],
)
def test_failures_are_one_sentence(fp8: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    got, out, error = quick(*(str(fp8) if a == "FP8" else a for a in arguments))
    assert (got, out) == (status, "")
    assert error.startswith("wan-runtime: ")
    assert said in error


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "0", "1 to 200"),
        ("--frames", "18", "17 or 21"),
        ("--size", "0x64", "at least 1"),
        ("--seed", "-1", "seed is -1"),
    ],
)
def test_what_no_model_can_make_is_refused_before_one_is_read(option: str, value: str, said: str) -> None:
    arguments = ("generate", "--prompt", "a cat", "--checkpoint", "none.safetensors", option, value)
    status, _, error = quick(*arguments)  # reading the model would fail too, and say that it is not there
    assert status == 2
    assert said in error and "none.safetensors" not in error
    assert quick("generate", "--prompt", " ", "--checkpoint", "none.safetensors")[0] == 2


def test_inspect_tells_the_producer_by_the_file_that_the_weights_were_made_from(tmp_path: Path) -> None:
    wanted = content("comfy", "nvfp4")
    wanted.tensors = {k: t for k, t in wanted.tensors.items() if not k.endswith("comfy_quant")}
    file, reference = wanted.write(tmp_path), files.Content(wan.state()).write(tmp_path / "reference")
    status, _, said = quick("inspect", file)
    assert status == 1 and "`wan-runtime inspect --reference FILE` tells the producer" in said
    status, out, said = quick("inspect", file, "--reference", reference, "--json")
    assert (status, said) == (0, "") and json.loads(out)[0]["dialect"] == "comfy"


@pytest.mark.parametrize("arguments", [("convert", "a"), ("nonsense",), ("inspect", "--nonsense")])
def test_wrong_usage_exits_with_two(arguments: tuple[str, ...]) -> None:
    assert quick(*arguments)[0] == 2


@pytest.mark.slow
def test_generate_writes_the_clip_that_a_converted_file_makes(tmp_path: Path) -> None:
    import av

    from wan_runtime.bases import tiny_checkpoint

    new, clip = tmp_path / "tiny-nvfp4.safetensors", tmp_path / "clip.mp4"
    wan_runtime.convert(tiny_checkpoint(), new, "modelopt-nvfp4", "original")
    status, text, said = quick(
        "generate", "--checkpoint", new, "--prompt", "a large red circle moving right on a black background",
        "--output", clip, "--size", "64x32", "--frames", 5, "--steps", 2, "--fps", 4, "--seed", 7, "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert status == 0, said
    made = json.loads(text)
    assert (made["seed"], made["frames"], made["width"], made["height"], made["fps"]) == (7, 5, 64, 32, 4)
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 32, 4)
        assert sum(1 for _ in container.decode(stream)) == 5


SCRIPT = "import sys; print(__name__, sys.argv[1:]); sys.exit(int(sys.argv[-1]))"


@pytest.mark.long
def test_run_gives_a_script_its_own_arguments_and_status(tmp_path: Path, command: Command) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for before in (("--weights", "nvfp4", "--"), ("--no-fuse",), ()):
        done = command("run", *before, script, "--json", "--weights", "3")
        assert done.returncode == 3, done.stderr
        assert done.stdout.strip() == "__main__ ['--json', '--weights', '3']"
    done = command("run", "--", script, "0")
    assert (done.returncode, done.stdout.strip()) == (1, "__main__ ['0']")
    assert "without loading a WAN model" in done.stderr  # a script that says all went well is held to it
    script.write_text("open('/none')")
    done = command("run", "--", script)
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 1)
    assert command("run", "--", tmp_path / "none.py").returncode == 2


def test_the_documentation_names_every_command_and_option(root: Path) -> None:
    text = (root / "docs" / "cli.md").read_text()
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for name, item in group.commands.items():
        assert f"## {name}" in text
        flags = [flag for parameter in item.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        missing = [
            flag for flag in flags if flag.startswith("--") and f"{flag}" not in text and flag != "--fuse"
        ]
        assert missing == [], name
