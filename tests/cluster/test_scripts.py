"""What the scripts in examples/slurm decide and run, with stand-ins for SLURM."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "slurm"

# srun runs what prepares a job; training it is $TRAINING, the doctor $DOCTOR_S.
_SRUN = r"""
echo "srun ${*//$'\n'/ }" >>"$CALLS"
case " $* " in
    *" megatron_periln.pretrain "*) eval "$TRAINING" ;;
    *" megatron_periln.doctor "*) eval "$DOCTORS" ;;
    *" megatron_periln.plan "*) eval "$PLANNING" ;;
    *) while [[ $1 == --* ]]; do shift; done; exec "$@" ;;
esac
"""
_SCONTROL = """
echo "scontrol $*" >>"$CALLS"
case "$*" in
    "show hostnames"*) printf '%s\\n' node1 node2 ;;
    "-o show job"*) echo "JobId=7 ExcNodeList=${EXCLUDED:-(null)} Other=1" ;;
esac
"""


class Node:
    """A batch host on which nothing but the scripts is real."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        self.calls = folder / "calls"
        programs = {"srun": _SRUN, "scontrol": _SCONTROL, "scancel": 'echo "scancel $*" >>"$CALLS"'}
        (folder / "bin").mkdir()
        for name, body in programs.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)

    def start(self, *arguments, script="pretrain.sbatch", training="true", restart=0, **environment):
        """Run a batch script to its end; return it, and the SLURM commands that it gave."""
        self.calls.write_text("")
        finished = subprocess.run(
            ["bash", SLURM / script, *(arguments or (self.run, "--num-layers", "4"))],
            env={
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "CALLS": str(self.calls),
                "REPO": str(ROOT),
                "PYTHON": sys.executable,
                "DOCTOR": "0",
                "TRAINING": training,
                "RUN": str(self.run),
                "SLURM_JOB_ID": "7",
                "SLURM_RESTART_COUNT": str(restart),
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_NTASKS_PER_NODE": "4",
                "SLURM_CPUS_ON_NODE": "32",
                "SLURM_SUBMIT_DIR": str(ROOT),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return finished, self.calls.read_text()


STOPPED = 'echo "exiting program after receiving SIGTERM." >>"$(ls -d "$RUN"/jobs/7*/restart_0)/node1.log"; '
SAVE = 'mkdir -p "$RUN/checkpoints"; echo {} >"$RUN/checkpoints/latest_checkpointed_iteration.txt"; '


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_first_start(node):
    (node.folder / "model.flags").write_text("--num-layers 4 # four\n--data-path '/a b'")
    finished, calls = node.start(node.run, f"@{node.folder}/model.flags", "--lr", "1", MY_API_KEY="secret")
    assert finished.returncode == 0, finished.stderr
    job = node.run / "jobs" / "7"
    assert shlex.split((job / "flags").read_text()) == [
        "--num-layers",
        "4",
        "--data-path",
        "/a b",
        "--lr",
        "1",
    ]
    assert (job / "code/megatron_periln/pretrain.py").read_bytes() == (
        ROOT / "megatron_periln/pretrain.py"
    ).read_bytes()
    environment = (job / "environment").read_text()
    assert "SLURM_JOB_ID=7" in environment and "MY_API_KEY=(not kept)" in environment
    assert "secret" not in environment
    assert (job / "environment").stat().st_mode & 0o077 == 0
    train = calls.splitlines()[-1]
    assert "--rdzv-endpoint=node1:20007 --rdzv-id=7.0" in train
    assert "--ntasks-per-node=1 --cpus-per-task=32" in train
    assert f"--output={job}/restart_0/%N.log" in train
    assert f"--save {node.run}/checkpoints --exit-signal-handler" in train
    assert "--load" not in train
    assert "requeue" not in calls


def test_restart_takes_the_snapshot(node):
    node.start()
    finished, calls = node.start(node.run, "--other", "flags", training=SAVE.format(5), restart=1)
    assert finished.returncode == 0, finished.stderr
    assert "--other" not in (node.run / "jobs/7/flags").read_text()
    assert "--load" not in calls
    finished, calls = node.start(node.run, "--other", "flags", restart=2, REPO="/nowhere")
    assert finished.returncode == 0, finished.stderr
    assert f"--load {node.run}/checkpoints" in calls.splitlines()[-1]


@pytest.mark.parametrize(
    ("place", "flags"),
    [
        ("checkpoints/non_persistent", "--non-persistent-ckpt-type global"),
        ("of its own", "--non-persistent-ckpt-type=global --non-persistent-global-ckpt-dir"),
    ],
)
def test_goes_on_from_non_persistent_checkpoints(node, place, flags):
    """Killed before its first persistent one, as after one that is older."""
    words = flags.split()
    if place == "of its own":
        words.append(f"{node.run}/{place}")
    save = f"mkdir -p '{node.run}/{place}'; echo 17 >'{node.run}/{place}/latest_checkpointed_iteration.txt'; "
    finished, calls = node.start(node.run, "--lr", "1", *words, training=f"{save}exit 3")
    assert "goes on from iteration 17" in finished.stdout
    finished, calls = node.start(training=SAVE.format(5) + "exit 3", restart=1)
    assert f"--load {node.run}/checkpoints" in calls.splitlines()[-2]
    assert "starts from iteration 17 " in finished.stdout
    finished, calls = node.start(training=SAVE.format(18), restart=2)
    assert "done at iteration 18" in finished.stdout
    assert [line.split()[:2] for line in (node.run / "jobs/7/history").read_text().splitlines()] == [
        ["0", "0"],
        ["1", "17"],
        ["2", "17"],
    ]


def test_goes_on_from_local_checkpoints(node):
    """Which may be on other nodes only."""
    folder = node.folder / "local"
    words = ["--non-persistent-ckpt-type", "local", "--non-persistent-local-ckpt-dir", str(folder)]
    save = f"mkdir -p {folder}/1; touch {folder}/1/iter_0000008_1_local.pt {folder}/1/iter_0000009_1_x.pt; "
    _, calls = node.start(node.run, *words, training="exit 3")
    assert "--load" not in calls
    finished, calls = node.start(training=f"{save}exit 3", restart=1)
    assert f"--load {node.run}/checkpoints" in calls
    assert "goes on from iteration 8" in finished.stdout


def test_goes_on_after_faults_that_follow_progress(node):
    finished, calls = node.start(training=SAVE.format(5) + "exit 3")
    assert finished.returncode == 3
    assert "scontrol requeue 7\n" in calls
    finished, calls = node.start(training=SAVE.format(9) + "exit 3", restart=1)
    assert "scontrol requeue 7\n" in calls
    finished, calls = node.start(training="exit 4", restart=2)  # a fault before the first checkpoint
    assert (finished.returncode, "requeue 7" in calls) == (4, True)
    finished, calls = node.start(training="exit 4", restart=3)
    assert (finished.returncode, "requeue" in calls) == (4, False)
    assert "2 starts in a row came no further than iteration 9" in finished.stdout
    finished, calls = node.start(restart=4)  # requeued by SLURM after all
    assert (finished.returncode, "pretrain" in calls) == (1, False)
    finished, calls = node.start(training=SAVE.format(11) + "exit 3", restart=100, MAX_STALLS="9")
    assert (finished.returncode, "requeue" in calls) == (3, False)
    assert "MAX_RESTARTS is 100" in finished.stdout


def test_warning_before_the_time_limit(node):
    training = SAVE.format(5) + "kill -USR1 $PPID; sleep 0.5; " + STOPPED
    finished, calls = node.start(training=training)
    assert finished.returncode == 1  # not done: what depends on it must not start
    assert calls.splitlines()[-2:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls = node.start(training=training, **array)  # 7 alone would be all of the array
    assert calls.splitlines()[-2:] == ["scancel --signal=TERM 7_3", "scontrol requeue 7_3"]


def test_cancelled(node):
    finished, calls = node.start(training=SAVE.format(5) + "kill -TERM $PPID; sleep 0.5; " + STOPPED)
    assert (finished.returncode, "requeue" in calls) == (143, False)
    assert "the last checkpoint is of iteration 5" in finished.stdout


def test_bad_nodes_are_left_out(node):
    finished, calls = node.start(DOCTOR="1", DOCTORS="true")
    assert (finished.returncode, "pretrain" in calls) == (0, True)
    assert "--nodelist=node2 --output=" in calls
    assert f"megatron_periln.doctor --tensorboard-dir {node.run}/tensorboard @" in calls
    bad = 'echo "GPU 3 is gone"; [[ $* != *--nodelist=node2* ]]'
    finished, calls = node.start(DOCTOR="1", DOCTORS=bad, EXCLUDED="node7")
    assert (finished.returncode, "pretrain" in calls) == (1, False)
    assert calls.splitlines()[-3:] == [
        "scontrol requeue 7",
        "scontrol -o show job 7",
        "scontrol update JobId=7 ExcNodeList=node2,node7",
    ]
    finished, calls = node.start(DOCTOR="1", DOCTORS="exit 1")
    assert (finished.returncode, "requeue" in calls) == (1, False)
    assert "no node passes the check" in finished.stderr


@pytest.mark.parametrize("script, ranks", [("pretrain.sbatch", 8), ("pretrain_srun.sbatch", 4)])
def test_a_run_that_cannot_fit_is_not_started(node, script, ranks):
    plan = {"script": script, "PLAN": "h100-80", "SLURM_GPUS_ON_NODE": "8"}
    finished, calls = node.start(PLANNING="echo error: the run does not fit >&2; false", **plan)
    assert (finished.returncode, "pretrain" in calls, "requeue" in calls) == (1, False, False)
    assert finished.stderr.splitlines()[0] == "error: the run does not fit"
    own = f"--world-size {2 * ranks} --nodes-of {ranks} --gpu h100-80 --brief "
    assert f"megatron_periln.plan {own}--tensorboard-dir" in calls
    finished, calls = node.start(PLANNING="true", **plan)
    assert (finished.returncode, "pretrain" in calls) == (0, True)
    _, calls = node.start(PLANNING="false", restart=1, **plan)  # it is known by now
    assert "megatron_periln.plan" not in calls
    _, calls = node.start(script=script, MAX_STALLS="9")
    assert "megatron_periln.plan" not in calls


def test_superseded(node):
    """A node that comes back must not touch the job that has been started elsewhere."""
    for signal in ("USR1", "TERM"):
        training = f"{SAVE.format(5)} mkdir -p $RUN/jobs/7/restart_1; kill -{signal} $PPID; sleep 0.5; exit 1"
        finished, calls = node.start(training=training)
        assert finished.returncode != 0
        assert "scancel" not in calls and "requeue" not in calls


def test_ranks_that_were_stopped_are_not_done(node):
    finished, _ = node.start(training=STOPPED)
    assert finished.returncode == 143


def test_containers(node):
    container = {"IMAGE": "/images/ngc.sqsh", "MOUNTS": "/data:/data", "MAX_STALLS": "9"}
    flags = "--container-image=/images/ngc.sqsh --container-mounts=/data:/data"
    for script in ("pretrain.sbatch", "pretrain_srun.sbatch"):
        finished, calls = node.start(script=script, **container)
        assert finished.returncode == 0, finished.stderr
        assert flags in calls.splitlines()[-1]
        assert "--no-container-mount-home" in calls.splitlines()[-1]
        _, calls = node.start(script=script, MAX_STALLS="9")
        assert "--container" not in calls


def test_a_task_for_each_rank(node):
    training = 'while [[ $1 == --* ]]; do shift; done; "$1" "$2" "$3" rank env | sort >"$RUN/ranks"'
    ids = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    finished, calls = node.start(script="pretrain_srun.sbatch", training=training, **ids)
    assert finished.returncode == 0, finished.stderr
    assert "--ntasks-per-node=4 --cpus-per-task=8" in calls
    ranks = dict(line.split("=", 1) for line in (node.run / "ranks").read_text().splitlines() if "=" in line)
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    expected |= {"MASTER_ADDR": "node1", "MASTER_PORT": "20007"}
    assert {name: ranks[name] for name in expected} == expected


def test_sweep(node):
    grid = {"PLACEMENTS": "pre peri", "RATES": "1e-3 2e-3", "SEEDS": "1 2 3"}
    cells = set()
    for task in range(12):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        finished, calls = node.start(node.run, "--num-layers", "4", script="sweep.sbatch", **grid, **array)
        assert finished.returncode == 0, finished.stderr
        words = calls.splitlines()[-1].split()
        cells.add(Path(words[words.index("--save") + 1]).parent.name)
    assert cells == {f"{p}_{r}_{s}" for p in ("pre", "peri") for r in ("1e-3", "2e-3") for s in (1, 2, 3)}
    flags = shlex.split((node.run / "peri_2e-3_3/jobs/7_11/flags").read_text())
    assert " ".join(flags) == "--num-layers 4 --norm-placement peri --seed 3 --lr 2e-3 --min-lr 0.0002"
    array["SLURM_ARRAY_TASK_ID"] = "12"
    finished, _ = node.start(node.run, "--num-layers", "4", script="sweep.sbatch", **grid, **array)
    assert (finished.returncode, "sbatch --array=0-11" in finished.stderr) == (1, True)


@pytest.mark.parametrize("tasks", [1, 8])
def test_a_sweep_without_torchrun_needs_a_task_for_each_gpu(node, tasks):
    environment = {"SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_GPUS_ON_NODE": "8"}
    finished, calls = node.start(
        script="sweep.sbatch", LAUNCHER="pretrain_srun.sbatch", SLURM_NTASKS="16", **environment
    )
    outcome = finished.returncode, "sbatch --ntasks-per-node=8" in finished.stderr, bool(calls)
    assert outcome == ((1, True, False) if tasks == 1 else (0, False, True))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["run"], {}, "usage: sbatch"),
        (["/proc/run", "--lr", "1"], {}, "/proc/run can't be written: give a folder that all nodes see"),
        (["RUN", "@/missing.flags"], {}, "flag file /missing.flags: No such file"),
        (["RUN", "--lr"], {"PYTHON": "/missing/python"}, "/missing/python can't run"),
        (["RUN", "--lr"], {"SITE": "/missing.sh"}, "/missing.sh: give SITE=FILE"),
    ],
)
def test_bad_input(node, arguments, environment, message):
    arguments = [str(node.run) if word == "RUN" else word for word in arguments]
    finished, calls = node.start(*arguments, **environment)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "requeue" not in calls and "pretrain" not in calls
    assert not (node.run / "jobs" / "7").exists()
