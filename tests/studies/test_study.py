"""What a study's file says, and what is refused."""

import pytest

from megatron_periln.errors import UsageError
from megatron_periln.studies.__main__ import main
from megatron_periln.studies.launching import is_forked, run_flags
from megatron_periln.studies.run_folder import RunFolder
from megatron_periln.studies.study import read_study

STUDY = """
about: Which is better?
flags: |
  @base.flags --lr 1e-3  # a comment
grid:
  norm-placement: [pre, peri]
  embedding:
    on: --embedding-norm
    off, really: --no-embedding-norm --weight-decay 0
seeds: [7, 8]
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.flags").write_text("--device cpu\n--num-layers 2")

    def write(text, name="question.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_grid_is_the_product_of_its_axes_seeds_last(write):
    study = read_study(write(STUDY))
    runs = study.runs()
    assert (study.name, study.about, study.ranks, study.save) == ("question", "Which is better?", 1, False)
    assert [run.seed for run in runs] == [7] * 4 + [8] * 4
    assert [tuple(run.choices.values()) for run in runs[:4]] == [
        ("pre", "on"),
        ("pre", "off, really"),
        ("peri", "on"),
        ("peri", "off, really"),
    ]
    base = ("--device", "cpu", "--num-layers", "2", "--lr", "1e-3")
    assert runs[5].flags == (
        *base, "--norm-placement", "pre", "--no-embedding-norm", "--weight-decay", "0", "--seed", "8",
    )  # fmt: skip
    assert runs[5].name == "norm-placement=pre,off,-really,seed=8"
    assert len({run.name for run in runs}) == 8


def test_flags_after_two_dashes_come_before_those_of_a_run(write):
    [run, *_] = read_study(write(STUDY), ["--lr", "5"]).runs()
    assert run.flags[4:8] == ("--lr", "1e-3", "--lr", "5")
    assert run.flags[-2:] == ("--seed", "7")


def test_study_without_a_grid_is_one_run_with_the_seed_of_megatron(write):
    [run] = read_study(write("flags: --lr 4e-3")).runs()
    assert (run.name, run.flags) == ("seed=1234", ("--lr", "4e-3", "--seed", "1234"))


def test_one_process_on_the_cpu_is_forked_and_others_are_not(write):
    assert is_forked(read_study(write("flags: '@base.flags'")))
    assert is_forked(read_study(write("flags: --device=cpu")))
    assert not is_forked(read_study(write("flags: '@base.flags'\nranks: 2")))
    assert not is_forked(read_study(write("flags: --device cuda --lr 1")))


def test_runs_write_into_their_folder(write, tmp_path):
    for save in ("true", "false"):
        study = read_study(write(f"flags: --lr 1\nsave: {save}"))
        [run] = study.runs()
        flags = run_flags(study, RunFolder(tmp_path / run.name, run))
        assert flags[flags.index("--monitor-file") + 1] == str(tmp_path / "seed=1234" / "monitor.jsonl")
        assert ("--save" in flags) == ("--load" in flags) == (save == "true")


BAD = {
    "no such file": (None, ["question.yaml", "No such file", "YAML file"]),
    "not YAML": ("flags: [", ["not YAML", "line"]),
    "a list": ("- flags", ["holds no keys", "about, flags, grid"]),
    "unknown key": ("flags: --lr 1\ngrids: {}", ["unknown key 'grids'", "a study has about, flags, grid"]),
    "a key twice": ("flags: --lr 1\nflags: --lr 2", ["flags stands twice"]),
    "no flags": ("seeds: 3", ["has no flags"]),
    "flags as a list": ("flags: [--lr, 1]", ["flags are text"]),
    "open quotes": ('flags: "--name \'x"', ["No closing quotation", "check its quotes"]),
    "no such flag file": ("flags: '@other.flags'", ["other.flags", "No such file"]),
    "word as a seed": ("flags: --lr 1\nseeds: [one]", ["seeds: 'one' is no int"]),
    "seed twice": ("flags: --lr 1\nseeds: [1, 1]", ["two runs would be called seed=1"]),
    "value twice": ("flags: --lr 1\ngrid: {lr: [1, 1]}", ["grid: lr has a value twice"]),
    "names alike": ("flags: --lr 1\ngrid: {a: {x y: '', x+/y: '', x y: ''}}", ["x y stands twice"]),
    "one name for two": ("flags: --lr 1\ngrid: {a: {x y: '', x/y: ''}}", ["two runs would be called x-y"]),
    "grid of a word": ("flags: --lr 1\ngrid: {lr: 1}", ["grid: lr needs a list of values for --lr"]),
    "empty axis": ("flags: --lr 1\ngrid: {lr: []}", ["grid: lr needs a list"]),
    "no ranks": ("flags: --lr 1\nranks: 0", ["ranks is 0"]),
    "save of a word": ("flags: --lr 1\nsave: maybe", ["save is true or false, not 'maybe'"]),
    "limit of a word": ("flags: --lr 1\ndiverged-above: high", ["diverged-above: 'high' is no float"]),
    "a seed among flags": ("flags: --lr 1 --seed=3", ["--seed differs from run to run", "key seeds"]),
    "a folder among flags": ("flags: --save x", ["--save differs from run to run", "--output"]),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_clear_error(case, write, tmp_path):
    text, parts = BAD[case]
    path = tmp_path / "question.yaml" if text is None else write(text)
    with pytest.raises(UsageError) as error:
        read_study(path)
    assert "\n" not in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--shard", "8/8"], ["--shard 8/8 is not I/N"]),
        (["--cell", "8"], ["--cell 8", "runs 0 to 7"]),
        (["--jobs", "0"], ["--jobs is 0"]),
        (["--shards", "0/8"], ["unknown flag --shards (did you mean --shard?)", "--help lists the flags"]),
        (["--cell", "1", "--list"], ["--list: not allowed with argument --cell", "--help lists the flags"]),
    ],
)
def test_wrong_flags_are_one_clear_error(arguments, parts, write, tmp_path, capsys):
    assert main([str(write(STUDY)), "--output", str(tmp_path / "runs"), *arguments]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "runs").exists()


def in_array(monkeypatch, task, tasks):
    for name, value in {"ID": task, "MIN": min(tasks), "MAX": max(tasks), "COUNT": len(tasks)}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@pytest.mark.parametrize("tasks", [(3, 7), (3,), (0,), (0, 2), (1, 2)])
def test_tasks_of_an_array_without_the_others_are_refused(tasks, write, tmp_path, monkeypatch, capsys):
    in_array(monkeypatch, tasks[0], tasks)
    assert main([str(write(STUDY)), "--output", str(tmp_path / "runs")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: SLURM_ARRAY_TASK_MIN {tasks[0]}, _MAX {tasks[-1]}, _COUNT {len(tasks)}: ")
    assert f"--shard {tasks[0]}/N" in line and "--cell K" in line
    assert not (tmp_path / "runs").exists()


def test_shards_share_the_runs_and_an_array_of_slurm_is_one(write, tmp_path, monkeypatch):
    from megatron_periln.studies import __main__ as command

    seen = []
    monkeypatch.setattr(
        command,
        "train",
        lambda study, folders, jobs, share_gpus: seen.append([folder.run.name for folder in folders]) or [],
    )
    everything = [run.name for run in read_study(write(STUDY)).runs()]
    arguments = [str(write(STUDY)), "--output", str(tmp_path / "runs")]
    for index in range(3):
        assert main([*arguments, "--shard", f"{index}/3"]) == 0
    for task in range(3):
        in_array(monkeypatch, task, (0, 1, 2))
        assert main(arguments) == 0
    assert seen[:3] == seen[3:]
    assert sorted(name for share in seen[:3] for name in share) == sorted(everything)
    assert main([*arguments, "--cell", "5"]) == 0
    assert seen[-1] == [everything[5]]
