"""compose.yaml and the Kubernetes example: against their own schemas, and against what the image and the server are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml  # type: ignore[import-untyped]

from wan_runtime.serve.cli import app

KUBERNETES = "examples/kubernetes/wan-serve.yaml"


def manifests(root: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((root / KUBERNETES).read_text()))


def the_container(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's specification and its one container."""
    [deployment] = [one for one in manifests(root) if one["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def test_compose_yaml_is_as_the_compose_specification_says(root: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(root / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_compose_file_is_noticed(root: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((root / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(wrong),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.parametrize("number", range(4))
def test_each_manifest_is_as_kubernetes_says(root: Path, number: int) -> None:
    assert len(manifests(root)) == 4
    kubernetes_validate.validate(manifests(root)[number], "1.34", strict=True)


def test_both_run_as_the_images_user_on_a_read_only_root_without_rights(root: Path) -> None:
    [user] = re.findall(r"useradd .*--uid (\d+)", (root / "Dockerfile").read_text())
    pod, container = the_container(root)
    service = yaml.safe_load((root / "compose.yaml").read_text())["services"]["serve"]
    assert service["user"] == f"{user}:{user}" and str(pod["securityContext"]["runAsUser"]) == user
    assert service["read_only"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert service["cap_drop"] == container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_every_variable_is_an_option_of_the_server(root: Path) -> None:
    command = typer.main.get_command(app)
    known = {f"WAN_SERVE_{str(option.name).upper()}" for option in command.params}
    _, container = the_container(root)
    compose = yaml.safe_load((root / "compose.yaml").read_text())["services"]["serve"]["environment"]
    used = {*compose, *(one["name"] for one in container["env"])}
    ours = {name for name in used if name.startswith("WAN_SERVE_")}
    assert len(ours) >= 4 and ours <= known, ours - known
