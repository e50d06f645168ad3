"""Bad command lines end with status 1 and one line that says what was wrong, where, and what to do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_periln.norms import PLACEMENTS
from tests.training.model import MODEL

ROOT = Path(__file__).parents[2]

BAD_FLAGS = {
    "unknown placement": (
        "--norm-placement sandwich",
        ["--norm-placement", "'sandwich'", "'peri'", "--help"],
    ),
    "several things": (
        "--norm-placment peri --norm-placement sandwich --fp8-format hybrid --openai-gelu --sft",
        [
            "5 things are wrong with these flags:",
            "--norm-placment peri",
            "'sandwich'",
            "--fp8-format: FP8 and FP4 need a GPU",
            "--openai-gelu",
            "--sft is not part",
        ],
    ),
    "misspelt flag": ("--norm-placment peri", ["--norm-placment peri", "--help"]),
    "frozen output norm without one": (
        "--norm-placement pre --freeze-output-norm",
        ["'pre' has no output norm", "freeze", "choose peri or output", "drop the output-norm options"],
    ),
    "depth-scaled weights without output norm": (
        "--norm-placement post --output-norm-init depth-scaled",
        ["'post' has no output norm", "choose peri or output"],
    ),
    "negative epsilon": ("--output-norm-epsilon -1", ["output_norm_epsilon must be positive", "-1.0"]),
    "hidden size": (
        "--hidden-size 66",
        ["--hidden-size (66) must be divisible by --num-attention-heads (4)", "change one"],
    ),
    "heads": (
        "--tensor-model-parallel-size 3",
        ["--num-attention-heads (4) must be divisible by --tensor-model-parallel-size (3)", "change one"],
    ),
    "vocabulary": (
        "--tensor-model-parallel-size 2 --padded-vocab-size 1027",
        [
            "--padded-vocab-size (1027), the vocabulary, must be divisible by --tensor-model-parallel-size",
            "import the model again with --make-vocab-size-divisible-by 2",
        ],
    ),
    "feed-forward size": (
        "--tensor-model-parallel-size 4 --ffn-hidden-size 130",
        ["--ffn-hidden-size (130) must be divisible by --tensor-model-parallel-size (4)"],
    ),
    "unknown backend": ("--norm-backend cuda", ["--norm-backend", "'cuda'", "'triton'", "--help"]),
    "compiled norms on the CPU": (
        "--norm-backend compile",
        ["norm backend 'compile'", "torch.compile is off under --device cpu", "choose auto or torch"],
    ),
    "two norms to fuse": (
        "--norm-placement output --fuse-pre-mlp-norm",
        ["--fuse-pre-mlp-norm", "--norm-placement output has not both norms", "drop one of them"],
    ),
    "fp8 on the CPU": (
        "--fp8-format hybrid",
        ["--fp8-format: FP8 and FP4 need a GPU", "--device cpu; drop it, or give --without-fp8"],
    ),
    "checkpoint arguments without checkpoint": (
        "--use-checkpoint-args",
        ["--use-checkpoint-args needs a checkpoint", "give --load or --pretrained-checkpoint"],
    ),
    "refused by Megatron twice": (
        "--seq-length 128 --load-main-params-from-ckpt",
        [
            "2 things are wrong with these flags",
            "--max-position-embeddings, --seq-length: max_position_embeddings",
            "--load-main-params-from-ckpt must be used with",
        ],
    ),
    "experts on too few ranks": (
        "--num-experts 4 --expert-model-parallel-size 4",
        ["WORLD_SIZE (1) must be divisible by expert-tensor x expert x pipeline parallel size (4)"],
    ),
    "refused by Megatron": (
        "--seq-length 128",
        ["Megatron refuses these flags", "max_position_embeddings (64)", "seq_length (128)"],
    ),
    "file of Megatron arguments": (
        "--yaml-cfg model.yaml",
        ["--yaml-cfg has no norm placement", "give flags, or a file of them as @FILE"],
    ),
    "no heads": ("--num-attention-heads 0", ["--num-attention-heads must be positive, not 0"]),
    "no ranks": ("--tensor-model-parallel-size 0", ["--tensor-model-parallel-size must be positive, not 0"]),
    "tokenizer without model": (
        "--tokenizer-type HuggingFaceTokenizer",
        ["HuggingFaceTokenizer needs --tokenizer-model"],
    ),
    "vocabulary without merges": (
        "--tokenizer-type GPT2BPETokenizer --vocab-file pyproject.toml",
        ["needs --merge-file beside --vocab-file", "give both"],
    ),
    "tokenizer model that is not there": (
        "--tokenizer-type TikTokenizer --tokenizer-model absent.json",
        ["--tokenizer-model absent.json: no such file"],
    ),
    "unwritable folder": ("--save /proc/checkpoints", ["--save /proc/checkpoints", "give a folder that can"]),
    "split": ("--split 1,a,2", ["--split 1,a,2 is not three shares such as 969,30,1"]),
    "monitor file without monitor": (
        "--monitor-file monitor.jsonl",
        ["--monitor-file does nothing without --monitor-layers"],
    ),
    "monitor without a file": (
        "--monitor-layers all --monitor-file /proc",
        ["--monitor-file /proc is a folder", "give a file in it"],
    ),
    "hybrid layers that need a GPU": (
        "--hybrid-layer-pattern D-M-",
        ["'D-M-': layers D need a GPU", "use layers *, +, -, E, M and G"],
    ),
    "fused norms in heterogeneous layers": (
        "--fuse-pre-mlp-norm --heterogeneous-layers-config-path layers.json",
        ["--fuse-pre-mlp-norm", "--heterogeneous-layers-config-path", "drop one of them"],
    ),
    "heterogeneous layers of another kind": (
        """--heterogeneous-layers-config-encoded-json '{"block_configs": []}'""",
        ["--heterogeneous-layers-config-encoded-json: 0 block_configs for --num-layers 2"],
    ),
    "latent experts on the CPU": (
        "--num-experts 4 --moe-latent-size 32",
        ["--moe-latent-size needs a GPU", "Transformer Engine"],
    ),
    "linear attention on the CPU": (
        "--experimental-attention-variant gated_delta_net --linear-attention-freq 2",
        ["--experimental-attention-variant needs a GPU", "Transformer Engine"],
    ),
    "too many experts for a token": (
        "--num-experts 4 --moe-router-topk 5",
        ["--moe-router-topk (5) must be at most --num-experts (4)"],
    ),
    "query groups": (
        "--group-query-attention --num-query-groups 3",
        ["--num-attention-heads (4) must be divisible by --num-query-groups (3)"],
    ),
    "returned keys": ("--dist-ckpt-strictness return_all", ["give log_unexpected or log_all"]),
    "validation sets": ("--multiple-validation-sets", ["--multiple-validation-sets needs --full-validation"]),
    "local attention backend": (
        "--attention-backend local",
        ["local layers have it by themselves", "drop it"],
    ),
    "refused with the configuration": (
        "--recompute-granularity full",
        ["Megatron refuses these flags", "recompute_method must be", "transformer_config.py"],
    ),
    "refused without words": (
        "--quick-geglu",
        ["Megatron refuses these flags: --quick-geglu, --swiglu: it needs `not args.swiglu`, and says"],
    ),
    "missing flag file": ("@absent.flags", ["flag file absent.flags", "No such file", "give @FILE"]),
}

OTHER_TRAINING = [
    "--sft",
    "--fim-data",
    "--perform-rl-step",
    "--logits-load-dir logits",
    "--hybrid-context-parallel",
]


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_refused(refused, name):
    arguments, words = BAD_FLAGS[name]
    error = refused(name.replace(" ", "-"), arguments)
    for word in words:
        assert word in error


@pytest.mark.parametrize("arguments", OTHER_TRAINING)
def test_other_kinds_of_training_are_refused(refused, arguments):
    flag = arguments.split()[0]
    error = refused(f"other{flag}", arguments)
    assert error == f"error: {flag} is not part of GPT pretraining with a norm placement; drop it"


def test_triton_needs_a_gpu_or_its_interpreter(refused):
    error = refused("triton", "--norm-backend triton", environment={"TRITON_INTERPRET": "0"})
    assert error.startswith(
        "error: norm backend 'triton': Triton's kernels need a GPU, or TRITON_INTERPRET=1"
    )
    assert error.endswith("choose auto")


def test_sequence_length_must_fit_sequence_parallelism(refused):
    flags = "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 63"
    error = refused("sequence-length", flags, environment={"WORLD_SIZE": "4"})
    assert "--seq-length (63) must be divisible by --tensor-model-parallel-size (4)" in error


def test_only_the_first_rank_speaks(refused):
    error = refused("world-size", "--pipeline-model-parallel-size 3", ranks=2)
    assert "WORLD_SIZE (2) must be divisible by tensor x pipeline x context parallel size (3)" in error
    assert "change one of them" in error


MISSING_PACKAGES = {
    "optimizer": ("--optimizer muon", "emerging_optimizers", ["emerging-optimizers", "choose adam or sgd"]),
    "tracking": (
        "--wandb-project x --wandb-exp-name y",
        "wandb",
        ["--wandb-project needs the package wandb", "pip install 'megatron-periln[wandb]'"],
    ),
}


@pytest.mark.parametrize("name", MISSING_PACKAGES)
def test_packages_that_are_missing_are_named(refused, name):
    flags, package, words = MISSING_PACKAGES[name]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    error = refused(f"missing-{package}", flags)
    for word in words:
        assert word in error


def test_a_tokenizer_that_is_none_is_named(refused, tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_text("no model")
    error = refused("no-model", f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model}")
    assert "SentencePieceTokenizer cannot be built" in error
    assert str(model) in error
    assert "check --tokenizer-model" in error


def test_what_the_model_builder_refuses_is_told_once(jobs):
    """When every rank has the save folder, and the process groups, already."""
    job = jobs.run("builder", f"{MODEL} --num-experts 4 --moe-layer-freq [1,1,1]", ranks=2, succeeds=False)
    assert job.exit_codes == [1, 1]
    assert "Traceback" not in job.log
    (error,) = [line for line in job.log.splitlines() if line.startswith("error:")]
    assert "Megatron refuses these flags: --moe-layer-freq, --num-layers: Invalid length of" in error
    assert "gpt_layer_specs.py:" in error


def test_the_traceback_is_shown_if_asked_for(jobs):
    job = jobs.run("traceback", f"{MODEL} --seq-length 128 --traceback", ranks=2, succeeds=False)
    logs = [path.read_text() for path in sorted(job.folder.glob("rank*.log"))]
    assert len(logs) == 2
    for log in logs:
        assert re.search(r"^Traceback(.|\n)*in validate_args(.|\n)*^AssertionError", log, re.MULTILINE)
    assert logs[0].splitlines()[-1].startswith("error: Megatron refuses these flags: ")
    assert "error:" not in logs[1]


@pytest.fixture
def damaged(indexed_bytes, tmp_path):
    """A copy of the dataset, to be damaged."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{indexed_bytes}{suffix}", tmp_path / f"copy_text_document{suffix}")
    return tmp_path / "copy_text_document"


def test_data_must_be_given(refused):
    error = refused("no-data", "", changes=["tests.training.test_command_line.forget_the_data"])
    assert "no data: give --data-path PREFIX" in error
    assert "tools/preprocess_data.py" in error
    assert "--mock-data" in error


def forget_the_data():
    at = sys.argv.index("--data-path")
    del sys.argv[at : at + 2]


def test_missing_dataset_is_named_with_what_is_near(refused, damaged):
    prefix = str(damaged).removesuffix("_text_document")
    error = refused("missing-data", f"--data-path {prefix}")
    assert f"{prefix}: no such dataset" in error
    assert f"did you mean {damaged}?" in error


def test_truncated_tokens_are_found(refused, damaged):
    size = damaged.with_suffix(".bin").stat().st_size
    os.truncate(damaged.with_suffix(".bin"), size - 2)
    error = refused("truncated-bin", f"--data-path {damaged}")
    assert f"{damaged}.bin: truncated: {size - 2} bytes" in error
    assert f"needs {size}; copy or preprocess the dataset again" in error


def test_foreign_index_is_found(refused, damaged):
    index = bytearray(damaged.with_suffix(".idx").read_bytes())
    index[:9] = b"TNTIDX\x00\x00\x00"
    damaged.with_suffix(".idx").write_bytes(index)
    error = refused("foreign-idx", f"--data-path {damaged}")
    assert f"{damaged}.idx: not an indexed dataset: it starts with b'TNTIDX" in error
    assert "tools/preprocess_data.py" in error


def test_help_all_shows_the_flags_of_megatron_too(jobs):
    job = jobs.run("help-all", common="--help-all")
    assert "--norm-placement P" in job.log
    for flag in ("--hidden-size", "--tensor-model-parallel-size", "--use-distributed-optimizer"):
        assert re.search(rf"^  {flag}\b", job.log, re.MULTILINE)
    assert not (job.folder / "curve.json").exists()


def pretrain(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "megatron_periln.pretrain", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_fits_a_screen_even_without_a_gpu():
    process = pretrain("--help")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("usage: torchrun --nproc-per-node N -m megatron_periln.pretrain")
    assert len(lines) < 60
    assert "norm placement:" in lines
    for word in (
        "--norm-placement",
        "--embedding-norm",
        "--freeze-output-norm",
        "--norm-backend",
        "--device",
        *PLACEMENTS,
    ):
        assert word in process.stdout


def test_no_gpu_is_an_error_that_says_what_to_do():
    process = pretrain("--num-layers", "2")
    assert process.returncode == 1
    (error,) = process.stderr.splitlines()
    assert error.startswith("error: no GPU is visible")
    assert "--device cpu" in error
    assert process.stdout == ""


def test_the_report_of_torchrun_names_the_cause(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert pretrain("@absent.flags").returncode == 1
    report = str(ChildFailedError("pretrain", {0: ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))}))
    assert "absent.flags" in report and "give @FILE the path of a text file" in report
    assert "To enable traceback" not in report
