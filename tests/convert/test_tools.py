"""What the command line names wrongly is told at once, before torch or Megatron is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
RUN = """
import sys
from importlib import import_module
sys.path.insert(0, sys.argv[1])
code = import_module(sys.argv[2]).main(sys.argv[3:])
print(code, sorted({"torch", "megatron", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "tool, flags, message",
    [
        ("export_hf", "--lod x --output new", "unknown flag --lod (did you mean --load?); --help lists"),
        ("import_hf", "--model model", "the following arguments are required: --output; --help lists the"),
        ("evaluate", "--windows many", "invalid int value: 'many'; --help lists the flags"),
        ("warm_start", "--seq-lenth 8", "unknown flag --seq-lenth (did you mean --seq-length?);"),
        ("export_hf", "--load x --output full", "--output full exists; choose another, or remove it"),
        ("import_hf", "--model model --output full", "--output full exists; choose another, or remove it"),
        (
            "warm_start",
            "--insert-output-norms --load x --data-path x --output full",
            "--output full exists; choose another, or remove it",
        ),
        ("export_hf", "--load x --output full/file/new", "full/file/new: cannot be written: "),
        ("import_hf", "--model Qwen/Qwen3 --output new", "Qwen/Qwen3: no such folder; hub names are not"),
        ("import_hf", "--model full --output new", "--model full holds no config.json; give the folder of"),
        ("export_gguf", "--model model --output full --llama-cpp x", "--output full: give a file's name in"),
        (
            "export_gguf",
            "--model model --output new --llama-cpp x",
            "--llama-cpp x: no convert_hf_to_gguf",
        ),
        ("evaluate", "--model nope --data-path x", "nope: no such folder; hub names are not fetched"),
        ("evaluate", "--model nope --tasks paper", "nope: no such folder; hub names are not fetched"),
    ],
)
def test_error_comes_first(tmp_path, tool, flags, message):
    for file in ("full/file", "model/config.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    ended = subprocess.run(
        [sys.executable, "-c", RUN, str(TOOLS), tool, *flags.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout == "1 []\n"
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1
    assert message in ended.stderr
    assert sorted(tmp_path.rglob("*")) == before
