"""API keys at rest, and the commands that make and revoke them."""

from __future__ import annotations

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from wan_runtime.serve import keys
from wan_runtime.serve.cli import app


def run(path: Path, *command: str) -> Result:
    return CliRunner().invoke(app, ["keys", *command, "--api-keys", str(path)], env={"COLUMNS": "200"})


def test_a_key_is_printed_once_and_kept_only_as_its_scrypt_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    result = run(path, "add", "alice", "--max-active", "2", "--per-minute", "9")
    assert result.exit_code == 0, result.output
    key = result.stdout.strip()
    text = path.read_text()
    [record] = json.loads(text)["keys"]
    secret = key.removeprefix(f"wan_{record['id']}_")
    assert len(secret) == 43 and secret not in text
    expected = hashlib.scrypt(secret.encode(), salt=bytes.fromhex(record["salt"]), n=2**14, r=8, p=1).hex()
    assert record["digest"] == expected
    assert (record["name"], record["max_active"], record["per_minute"]) == ("alice", 2, 9)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == ["keys.json"]


def test_keys_are_listed_without_their_hashes_and_revoked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = run(path, "add", "alice").stdout.strip()
    run(path, "add", "bob")
    listed = run(path, "list").stdout
    assert "alice" in listed and "bob" in listed
    [alice, _] = json.loads(path.read_text())["keys"]
    assert alice["digest"] not in listed and alice["salt"] not in listed
    assert keys.find(keys.read(path), key) is not None
    assert run(path, "revoke", "alice").exit_code == 0
    assert keys.find(keys.read(path), key) is None
    assert "alice" not in run(path, "list").stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["add", "alice"], "has a key named 'alice' already"),
        (["add", "a\nb"], "is not plain"),
        (["add", ""], "is not plain"),
        (["revoke", "carol"], "has no key named 'carol'. It has: alice"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    tmp_path: Path, command: list[str], said: str
) -> None:
    path = tmp_path / "keys.json"
    run(path, "add", "alice")
    before = path.read_bytes()
    result = run(path, *command)
    assert (result.exit_code, said in result.output) == (1, True), result.output
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"keys": [{"id": "a"}]}', '{"keys": [{"name": 3, "x": 1}]}']
)
def test_a_file_of_something_else_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    for command in (["add", "alice"], ["list"]):
        result = run(path, *command)
        assert (result.exit_code, "is not a file that" in result.output) == (1, True)
    assert path.read_text() == text


def test_keys_added_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add(number: int) -> None:
        keys.add(path, keys.make(f"user {number}")[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    assert {record.name for record in keys.read(path).values()} == {f"user {number}" for number in range(16)}


def test_a_key_has_to_match_to_the_last_letter(tmp_path: Path) -> None:
    key, record = keys.make("alice")
    ring = {record.id: record}
    assert keys.find(ring, key) == record
    other = "A" if key[-5] != "A" else "B"
    for wrong in (
        key[:-1],
        key + "A",
        key[:-5] + other + key[-4:],
        key.upper(),
        f"{key}\n",
        "",
        record.digest,
    ):
        assert keys.find(ring, wrong) is None


def test_a_running_server_takes_up_changes_and_forgets_revoked_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, record = keys.make("alice")
    keys.add(path, record)
    ring = keys.KeyRing(path)
    assert ring.known(key) is None and ring.find(key) == record and ring.known(key) == record
    keys.revoke(path, "alice")
    ring.refresh()
    assert ring.known(key) is None and ring.find(key) is None
