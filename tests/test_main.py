"""``megatron-periln COMMAND``."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_periln.__main__ import COMMANDS, main

TOOLS = Path(__file__).parents[1] / "tools"


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["megatron-periln", *argv])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_every_command_has_a_module() -> None:
    assert [name for name, (module, _) in COMMANDS.items() if find_spec(module) is None] == []


def test_every_tool_is_a_command() -> None:
    tools = {path.stem.replace("_", "-") for path in TOOLS.glob("*.py")} - {"image-packages"}
    assert tools <= COMMANDS.keys()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, argv: list[str]
) -> None:
    assert run(monkeypatch, *argv) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


def test_an_unknown_command_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "preproces-data", "--help") == 1
    message = "error: unknown command preproces-data (did you mean preprocess-data?); --help lists them\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("name", ["merge-datasets", "merge_datasets"])
def test_a_command_has_its_own_flags_and_name(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_periln", name]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: megatron-periln {name} [-h]")
    absent = [*command, "--input", str(tmp_path / "absent"), "--output-prefix", str(tmp_path / "out")]
    refused = subprocess.run(absent, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.startswith("error: --input")) == (1, True)


@pytest.mark.parametrize("path", sorted(TOOLS.glob("*.py")), ids=lambda path: path.stem)
def test_a_tool_starts_from_any_folder(path: Path, tmp_path: Path) -> None:
    """As Megatron-LM's users type it; only what is asked for is imported."""
    command = [sys.executable, str(path), "--help"]
    assert "usage:" in subprocess.check_output(command, text=True, cwd=tmp_path).lower()
