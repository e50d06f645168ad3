"""A flag that acts only beside another is named when the other is missing, and not when it is there."""

import pytest

from megatron_periln.training.idle_flags import idle_flags
from tests.training import flag_trials as trials

DATA = "~--mock-data --data-path data"
MOE = trials.MOE

# A flag, and what it acts beside; the reason names it, unless other words are given.
BESIDE = [
    ("--linear-attention-freq 4", "--experimental-attention-variant gated_delta_net"),
    ("--linear-conv-kernel-dim 2", "--experimental-attention-variant gated_delta_net"),
    ("--linear-key-head-dim 8", "--experimental-attention-variant gated_delta_net"),
    ("--linear-value-head-dim 8", "--experimental-attention-variant gated_delta_net"),
    ("--linear-num-key-heads 2", "--experimental-attention-variant gated_delta_net"),
    ("--linear-num-value-heads 4", "--experimental-attention-variant gated_delta_net"),
    ("--moe-shared-expert-overlap", "--moe-shared-expert-intermediate-size 8"),
    ("--moe-token-drop-policy position", "--moe-expert-capacity-factor 1.0"),
    ("--moe-router-num-groups 2", "--moe-router-group-topk 1"),
    ("--moe-router-bias-update-rate 0.1", "--moe-router-enable-expert-bias"),
    ("--moe-upcycling-granularity 2", "--moe-use-upcycling"),
    ("--moe-flex-dispatcher-backend hybridep", "--moe-token-dispatcher-type flex"),
    ("--moe-deepep-num-sms 8", "--moe-token-dispatcher-type flex"),
    ("--sequence-parallel", "--tensor-model-parallel-size 2"),
    ("--cp-comm-type a2a", "--context-parallel-size 2"),
    ("--account-for-loss-in-pipeline-split", "--pipeline-model-parallel-size 2"),
    ("--no-overlap-p2p-communication", "--num-layers-per-virtual-pipeline-stage 1"),
    ("--microbatch-group-size-per-virtual-pipeline-stage 2", "--num-layers-per-virtual-pipeline-stage 1"),
    ("--ddp-bucket-size 8", "--overlap-grad-reduce"),
    ("--ddp-pad-buckets-for-high-nccl-busbw", "--use-distributed-optimizer"),
    ("--dist-ckpt-optim-fully-reshardable", "--use-distributed-optimizer"),
    ("--cuda-graph-modules attn", "--cuda-graph-impl local"),
    ("--apply-wd-to-qk-layernorm", "--qk-layernorm"),
    ("--save-interval 5", "--save folder"),
    ("--async-save --use-persistent-ckpt-worker", "--save folder"),
    ("--async-save --save folder", "--use-persistent-ckpt-worker"),
    ("--async-strategy mcore", "--async-save"),
    ("--ckpt-fully-parallel-load", "--load folder"),
    ("--override-opt_param-scheduler", "--load folder"),
    ("--exit-signal SIGUSR1", "--exit-signal-handler"),
    ("--tiktoken-pattern v1", "--tokenizer-type TikTokenizer"),
    ("--vocab-file vocab.json", "--tokenizer-type GPT2BPETokenizer"),
    ("--merge-file merges.txt", "--tokenizer-type GPT2BPETokenizer"),
    ("--tokenizer-hf-no-use-fast", "--tokenizer-type HuggingFaceTokenizer"),
    ("--log-timers-to-tensorboard", "--tensorboard-dir folder"),
    ("--wandb-project name", "--tensorboard-dir folder"),
    ("--wandb-exp-name name", "--wandb-project name"),
    ("--flight-recorder-trace-buffer-size 5", "--flight-recorder-dump-path folder"),
]


def idle(flags):
    args = trials.parser().parse_args(trials.without_removed(f"{trials.COMMON} {flags}".split()))
    return {line.partition(" (")[0]: line for line in idle_flags(args, trials.parser())}


@pytest.mark.parametrize(("flags", "beside"), BESIDE, ids=[flags.split()[0] for flags, _ in BESIDE])
def test_it_is_named_where_the_other_is_missing(monkeypatch, flags, beside):
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    flag = flags.split()[0]
    model = MOE if "moe" in flag else ""
    assert beside.split()[0] in idle(f"{model} {flags}")[flag]
    assert flag not in idle(f"{model} {flags} {beside}")


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ("--split 90,5,5", False),
        (f"--split 90,5,5 {DATA}", True),
        ("--eval-global-batch-size 2 --eval-iters 0", False),
        ("--eval-global-batch-size 2", True),
        (f"{MOE} --moe-aux-loss-coeff 0.1", True),
        (f"{MOE} --moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type sinkhorn", False),
        (f"{MOE} --moe-aux-loss-coeff 0.1 0.1 --moe-router-load-balancing-type aux_loss seq_aux_loss", True),
        ("--vocab-file vocab.json ~--tokenizer-type", True),
        ("--checkpoint-verify size", False),
        ("--checkpoint-verify size --load folder", True),
        ("--chat-template {{messages}}", False),
        ("--no-save-rng", False),
    ],
)
def test_whether_a_flag_acts(flags, there):
    flag = next(word for word in flags.split() if word.startswith("--") and word not in MOE)
    assert (flag not in idle(flags)) == there


def test_a_vocabulary_acts_where_transformers_finds_no_other(tmp_path):
    flags = f"--vocab-file vocab.json --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}"
    assert "--vocab-file" not in idle(flags)
    (tmp_path / "tokenizer.json").touch()
    assert "--vocab-file" in idle(flags)
