"""Configurations of pretraining, by the command line, and the losses that the CPU has with the same flags.

``python -m tests.gpu.pretraining`` runs the CPU's and writes ``pretraining_losses.json``: minutes. Weights
are drawn on the CPU everywhere (``--use-cpu-initialization``), so that both devices start from the same; but
for grouped experts, for which Transformer Engine draws.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_periln.data.indexed.format import HEADER, MAGIC, VERSION
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
LOSSES = Path(__file__).with_name("pretraining_losses.json")

_BASE = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --seq-length 128
    --max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 4
    --global-batch-size 8 --train-iters 8 --lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --seed 7
    --use-cpu-initialization --tokenizer-type NullTokenizer --vocab-size 255
    --make-vocab-size-divisible-by 128 --split 99,1,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --num-workers 0
"""
_MODERN = """--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"""
_BIASED = "--normalization LayerNorm --position-embedding-type learned_absolute"
_MOE = f"{_MODERN} --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 128"
# Megatron fuses the rotation of latent attention with YaRN alone.
_MLA = f"""{_MODERN.partition(" --group-query")[0]} --multi-latent-attention --q-lora-rank 64
    --kv-lora-rank 64 --qk-head-dim 32 --qk-pos-emb-head-dim 32 --v-head-dim 32 --rope-type rope
    --qk-layernorm --no-rope-fusion"""
_PERI = f"{_MODERN} --norm-placement peri"
_HYBRID = f"""{_MODERN} --norm-placement peri --mamba-state-dim 64 --mamba-head-dim 32
    --mamba-num-groups 2 --linear-conv-kernel-dim 4 --linear-key-head-dim 32 --linear-value-head-dim 32
    --linear-num-key-heads 4 --linear-num-value-heads 4"""
_LOCAL = "--transformer-impl local --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_DROPOUT = f"--bf16 {_PERI} --hidden-dropout 0.1"
_ASYNC = """--save {folder}/checkpoints --save-interval 4 --async-save --use-persistent-ckpt-worker
    --async-strategy mcore"""

BF16, FP32 = 0.004, 5e-4
"""How far losses may be off those of the CPU, which rounds elsewhere."""


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes
    ----------
    name
        In the table, and of its test.
    flags
        Beside those that all have.
    tolerance
        How far a loss may be off the CPU's, as a share.
    like
        The case whose CPU losses are expected, if not its own: the CPU can't run this one, or need not,
        because both compute the same. "" where there is no counterpart: the loss is to fall.
    resumed
        Whether it ends half-way and goes on from its checkpoint.
    needs
        A module that is not there on every machine.
    """

    name: str
    flags: str
    tolerance: float = BF16
    like: str | None = None
    resumed: bool = False
    needs: str = ""


CASES = (
    # Most telling first.
    Case("peri", f"--bf16 {_PERI}"),
    Case("pre", f"--bf16 {_MODERN} --norm-placement pre"),
    Case("recomputed, dropout, compile", f"{_DROPOUT} {_FULL} --norm-backend compile", 0.03, "peri"),
    Case("fp32 residual", f"--bf16 {_PERI} --fp32-residual-connection"),
    Case("pre, fp32 residual", f"--bf16 {_MODERN} --norm-placement pre --fp32-residual-connection"),
    Case("fp8 delayed", f"--bf16 {_PERI} --fp8-format hybrid", 0.03, "peri"),
    Case("moe", f"--bf16 {_MOE} --norm-placement peri", 0.01),
    Case("graphs of layers, te", f"--bf16 {_PERI} --cuda-graph-impl transformer_engine", BF16, "peri"),
    Case("graphs of layers, local", f"--bf16 {_PERI} --cuda-graph-impl local", BF16, "peri"),
    Case("post", f"--bf16 {_MODERN} --norm-placement post"),
    Case("output", f"--bf16 {_MODERN} --norm-placement output"),
    Case("fused with the next norm", f"--bf16 {_PERI} --fuse-pre-mlp-norm", BF16, "peri"),
    Case("layernorm and biases", f"--bf16 {_BIASED} --norm-placement peri"),
    Case("moe, grouped", f"--bf16 {_MOE} --norm-placement peri --moe-grouped-gemm", 0.03, "moe"),
    Case("mtp", f"--bf16 {_PERI} --mtp-num-layers 1"),
    Case("mla", f"--bf16 {_MLA} --norm-placement peri", 0.01),
    Case("fp8 tensorwise", f"--bf16 {_PERI} --fp8-format hybrid --fp8-recipe tensorwise", 0.03, "peri"),
    Case("fp8 blockwise", f"--bf16 {_PERI} --fp8-format e4m3 --fp8-recipe blockwise", 0.03, "peri"),
    Case("asynchronous saves, resumed", f"--bf16 {_PERI} {_ASYNC}", BF16, "peri", resumed=True),
    Case(
        "distributed optimizer, overlap",
        f"--bf16 {_PERI} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        BF16,
        "peri",
    ),
    Case(
        "moe, graphs of attention, te",
        f"--bf16 {_MOE} --norm-placement peri --cuda-graph-impl transformer_engine "
        "--cuda-graph-modules attn moe_router",
        0.01,
        "moe",
    ),
    Case("muon", f"--bf16 {_PERI} --optimizer muon", 0.02, needs="emerging_optimizers"),
    Case("mamba", f"--bf16 {_HYBRID} --hybrid-layer-pattern M*-M-", 0.01, needs="mamba_ssm"),
    Case("delta nets", f"--bf16 {_HYBRID} --hybrid-layer-pattern G-*-", 0.01, needs="fla"),
    Case(
        "graphs of attention, te",
        f"--bf16 {_PERI} --cuda-graph-impl transformer_engine --cuda-graph-modules attn",
        BF16,
        "peri",
    ),
    Case(
        "graphs of layers, te, fp8",
        f"--bf16 {_PERI} --cuda-graph-impl transformer_engine --fp8-format hybrid",
        0.03,
        "peri",
    ),
    Case(
        "graphs of layers, te, dropout",
        f"{_DROPOUT} --cuda-graph-impl transformer_engine --te-rng-tracker",
        0.03,
        "peri",
    ),
    Case(
        "graphs of layers, local, overlap",
        f"--bf16 {_PERI} --cuda-graph-impl local --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
        BF16,
        "peri",
    ),
    Case(
        "graphs of layers, local, fp8",
        f"--bf16 {_PERI} --cuda-graph-impl local --fp8-format hybrid",
        0.03,
        "peri",
    ),
    Case("fp32", _PERI, FP32),
    Case("fp16", f"--fp16 --initial-loss-scale 1024 {_PERI}", BF16, "peri"),
    Case("qk norm", f"--bf16 {_PERI} --qk-layernorm"),
    Case("local layers", f"--bf16 {_PERI} {_LOCAL}", BF16, "peri"),
    Case("backend compile", f"--bf16 {_PERI} --norm-backend compile", BF16, "peri"),
    Case(
        "input norms recomputed",
        f"--bf16 {_PERI} --recompute-granularity selective --recompute-modules layernorm",
        BF16,
        "peri",
    ),
    Case("residual fused with te's norm", f"--bf16 {_PERI} --fused-residual-rmsnorm", BF16, "peri"),
    Case("recomputed, dropout", f"{_DROPOUT} {_FULL}", 0.03, "peri"),
)


def flags_of(case: Case, folder: Path, device: str) -> list[str]:
    """Return the command line of a case whose files go to ``folder``."""
    words = shlex.split(f"{_BASE} {case.flags.format(folder=folder)}")
    data = ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache")]
    return [*words, *data, "--device", device]


def write_data(prefix: Path) -> None:
    """Write an indexed dataset from which a model learns at once: most ids follow from the one before."""
    generator = np.random.default_rng(1)
    documents, length = 64, 400
    tokens = np.empty((documents, length), np.uint16)
    tokens[:, 0] = generator.integers(0, 251, documents)
    for index in range(1, length):
        follows = (5 * tokens[:, index - 1].astype(int) + 17) % 251
        noise = generator.random(documents) < 0.1
        tokens[:, index] = np.where(noise, generator.integers(0, 251, documents), follows)
    tokens[:, -1] = 255  # the end of the document
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    index = [HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1)]
    index.append(np.full(documents, length, np.int32).tobytes())
    index.append((2 * length * np.arange(documents, dtype=np.int64)).tobytes())
    index.append(np.arange(documents + 1, dtype=np.int64).tobytes())
    prefix.with_suffix(".idx").write_bytes(b"".join(index))


@dataclass(frozen=True)
class Outcome:
    """What came of a run: its losses by iteration, the seconds it took, and the error that ended it."""

    losses: dict[int, float]
    seconds: float
    error: str = ""


def run(case: Case, folder: Path, device: str, timeout: float) -> Outcome:
    """Pretrain; a run that is to be resumed ends after four iterations and goes on."""
    started = time.monotonic()
    write_data(folder / "data")
    rounds = [["--exit-interval", "4"], ["--load", str(folder / "checkpoints")]] if case.resumed else [[]]
    log, code = "", 0
    for extra in rounds:
        command = [sys.executable, "-W", "ignore", "-m", "megatron_periln.pretrain"]
        try:
            done = subprocess.run(
                [*command, *flags_of(case, folder, device), *extra],
                env=_alone(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as expired:
            said = expired.stdout or b""
            log += said.decode(errors="replace") if isinstance(said, bytes) else said
            log, code = f"{log}\nerror: no end in {timeout:g} s", 1
            break
        log, code = log + done.stdout, done.returncode
        if code:
            break
    (folder / "log").write_text(log)
    losses = {int(a): float(b) for a, b in re.findall(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+|nan)", log)}
    return Outcome(losses, time.monotonic() - started, _error(log, code) if code else "")


def _error(log: str, code: int) -> str:
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if re.match(r"error: |(\[rank0\]: )?[\w.]*(Error|Exception)\b", line)]
    return (errors or [line for line in lines if line] or [""])[-1][:300] or f"exit status {code}"


def _alone() -> dict[str, str]:
    """Return the environment of a job of one rank, with a port of its own."""
    rank = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    mine = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**mine, **rank, "PYTHONPATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def expected_losses(case: Case) -> dict[int, float] | None:
    """Return the CPU's losses for a case, None where it has no counterpart."""
    if case.like == "":
        return None
    saved = json.loads(LOSSES.read_text())[case.like or case.name]
    losses = {int(iteration): loss for iteration, loss in saved["losses"].items()}
    if case.resumed:  # of its first two losses a run prints the first, then the mean (training_log)
        losses[6] = (losses[5] + losses[6]) / 2
    return losses


def verdict(case: Case, outcome: Outcome) -> str:
    """Return what is wrong with an outcome, "" if nothing is."""
    if outcome.error:
        return outcome.error
    expected = expected_losses(case)
    got = outcome.losses
    if expected is None:
        falls = len(got) == 8 and got[8] < 0.9 * got[1]
        return "" if falls else f"the loss does not fall: {got}"
    if got.keys() != expected.keys():
        return f"iterations {sorted(got)} for {sorted(expected)}"
    off = _off(got, expected)
    return "" if off <= case.tolerance else f"{off:.2%} off the CPU's losses; allowed: {case.tolerance:.2%}"


def _off(losses: dict[int, float], expected: dict[int, float]) -> float:
    """Return by how much the worst loss is off, as a share; infinity for one that is no number."""
    off = [abs(losses[i] / expected[i] - 1) for i in expected]
    return max(math.inf if math.isnan(one) else one for one in off)


def line(case: Case, outcome: Outcome) -> str:
    """Return a case's line of the table."""
    expected = expected_losses(case)
    losses = " ".join(f"{i}:{loss:.4f}" for i, loss in outcome.losses.items() if i in (1, 2, 4, 6, 8))
    same = expected is not None and outcome.losses.keys() == expected.keys()
    off = f"{_off(outcome.losses, expected or {}):.3%}" if same else ""
    wrong = verdict(case, outcome)
    state = "FAILED" if wrong else "ok"
    return f"{case.name:<34}{state:<8}{outcome.seconds:>6.1f} s  {off:>8}  {losses}  {wrong}".rstrip()


def on_the_cpu() -> list[Case]:
    """Return the cases whose losses on the CPU are kept."""
    return [case for case in CASES if case.like is None]


def record(case: Case) -> dict[str, object]:
    """Run a case on the CPU; return what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(case, Path(folder), "cpu", timeout=1800)
    print(f"{case.name:<34}{outcome.seconds:>6.1f} s  {outcome.error}".rstrip(), flush=True)
    if outcome.error:
        raise RuntimeError(f"{case.name}: {outcome.error}")
    return {"flags": " ".join(case.flags.split()), "losses": outcome.losses}


def main() -> None:
    """Write the CPU's losses: of all cases, or of those that are named."""
    kept = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    cases = [case for case in on_the_cpu() if case.name in sys.argv[1:] or not sys.argv[1:]]
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        running = {pool.submit(record, case): case.name for case in cases}
        for done in concurrent.futures.as_completed(running):
            kept[running[done]] = done.result()
            in_order = {case.name: kept[case.name] for case in on_the_cpu() if case.name in kept}
            LOSSES.write_text(json.dumps(in_order, indent=1) + "\n")


if __name__ == "__main__":
    main()
