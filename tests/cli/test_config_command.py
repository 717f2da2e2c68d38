"""`kvtier` and `kvtier config`: exit codes, where output goes, errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cli import main
from kvtier.cli.output import check_json_target, write_json
from kvtier.config import Config
from kvtier.errors import KVTierError

CONFIGS = Path(__file__).parents[2] / "configs"
SERVER = str(CONFIGS / "server.yaml")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def kvtier(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from kvtier.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_help_imports_no_tensor_library():
    code = "import sys; from kvtier.cli import main; main(['--help']); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "config" in done.stdout) == (0, True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvtier ")


def test_show_says_where_each_value_came_from_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("KVTIER_MOVER__WORKERS", "3")
    assert main(["config", "show", SERVER, "--set", "host.capacity_bytes=2GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {words[0]: words[1:] for line in lines if len(words := line.split()) == 3}
    assert rows["host.capacity_bytes"] == ["2GiB", "argument"]
    assert rows["mover.workers"] == ["3", "environment"]
    assert rows["pages.page_tokens"] == ["64", "file"]
    assert rows["policy.name"] == ["a2cr", "default"]


def test_json_to_stdout_leaves_stdout_to_the_program(capsys):
    assert main(["config", "show", SERVER, "--json", "-"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown["config"]["pages"]["page_tokens"] == 64
    assert shown["origins"]["pages.page_tokens"] == {"kind": "file", "name": SERVER}
    assert "page_tokens" in captured.err


def test_json_to_a_file(capsys, tmp_path):
    assert main(["config", "show", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["config"] == Config().model_dump(mode="json")
    assert "page_tokens" in capsys.readouterr().out


def test_yaml_output_is_a_file_that_check_accepts(capsys, tmp_path):
    assert main(["config", "show", SERVER, "--yaml"]) == 0
    (tmp_path / "copy.yaml").write_text(capsys.readouterr().out)
    assert main(["config", "check", str(tmp_path / "copy.yaml")]) == 0


def test_check_says_ok_or_one_line_per_bad_file(capsys, tmp_path):
    bad, worse = tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    bad.write_text("host: {capcity_bytes: 1}")
    worse.write_text("disk: {format: q4}\npages: {page_tokens: 0}")
    assert main(["config", "check", *map(str, sorted(CONFIGS.glob("*.yaml")))]) == 0
    assert capsys.readouterr().out.count("ok: ") == 5
    assert main(["config", "check", SERVER, str(bad), str(worse), "--json", "-"]) == 2
    captured = capsys.readouterr()
    assert [entry["ok"] for entry in json.loads(captured.out)] == [True, False, False]
    good, first, second = captured.err.splitlines()
    assert good == f"ok: {SERVER}"
    assert first == f"kvtier: error: {bad}: unknown key 'host.capcity_bytes'; the nearest known key is host.capacity_bytes"
    assert second.startswith(f"kvtier: error: {worse}: ")
    assert "page_tokens is 0" in second
    assert "disk.path is missing" in second


def test_check_with_an_override_that_fits_no_file(capsys):
    assert main(["config", "check", SERVER, "--set", "host.format=q8+lz4"]) == 2
    assert capsys.readouterr().err.startswith(f"kvtier: error: {SERVER}: argument host.format: host.format is 'q8+lz4'")


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "show", "missing\nfile.yaml"],
        ["config", "show", "--set", "host.nope=1"],
        ["config", "show", "--set", "nothing"],
        ["config", "show", "--json", "/no/such/directory/x.json"],
        ["config", "check", "missing.yaml"],
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_two(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kvtier: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "what", "where"),
    [
        (["nope"], "no such command 'nope'", "kvtier"),
        (["config", "chekc"], "no such command 'chekc'. Did you mean 'check'?", "kvtier config"),
        (["config", "show", "--nope"], "no such option: --nope", "kvtier config show"),
        (["config", "check"], "missing argument 'FILE...'", "kvtier config check"),
        (["tune"], "missing argument 'TRACE...'", "kvtier tune"),
        (["run", "--sessions", "many"], "invalid value for '--sessions'", "kvtier run"),
    ],
)
def test_wrong_usage_is_one_line_that_says_where_to_read_on(arguments, what, where, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"kvtier: error: {what}")
    assert captured.err.endswith(f"; see `{where} --help`\n")
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_nothing_asked_is_answered_with_the_commands(capsys):
    assert main(["config"]) == 2
    captured = capsys.readouterr()
    assert "check" in captured.out + captured.err
    assert "error" not in captured.err


def test_what_the_terminal_cannot_show_is_no_traceback(tmp_path):
    """Before, a path or a process name outside its encoding ended in a UnicodeEncodeError."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "kvtier", "config", "check", str(tmp_path / "語.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    (tmp_path / "語.yaml").write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u8a9e.yaml" in done.stdout


def test_interrupt_and_a_reader_that_left_are_quiet(capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtier.config.resolve_config", interrupted)
    assert main(["config", "show"]) == 130
    code = "import sys; from kvtier.cli import main; sys.exit(main(['config', 'reference']))"
    done = subprocess.run(["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "{code}" | true'], capture_output=True, check=False)
    assert done.stderr == b""
    assert "Traceback" not in capsys.readouterr().err


def test_a_json_target_can_be_tried_before_the_work(tmp_path):
    check_json_target(None)
    check_json_target("-")
    check_json_target(str(tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()
    write_json([1], str(tmp_path / "old.json"))
    check_json_target(str(tmp_path / "old.json"))
    assert json.loads((tmp_path / "old.json").read_text()) == [1]
    with pytest.raises(KVTierError, match="cannot write"):
        check_json_target(str(tmp_path / "none" / "x.json"))


def test_reference_speaks_json(capsys):
    assert main(["config", "reference", "--json", "-"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["host.capacity_bytes"]["default"] == "4GiB"
    assert rows["disk.path"]["default"] is None
    assert all(row["meaning"] for row in rows.values())
