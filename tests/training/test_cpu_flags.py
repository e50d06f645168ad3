"""What ``--device cpu`` turns off changes nothing else: the arguments are those of a run without it."""

import enum

import pytest

from megatron_periln.cpu.flags import COUNTERPARTS, REPLACED, adapt_arguments
from megatron_periln.rules import Problems
from megatron_periln.training import parsing
from tests.training import flag_trials as trials

pytestmark = pytest.mark.usefixtures("single_process", "launched")

GIVEN = """
    --cuda-graph-impl local --cuda-graph-modules attn --optimizer-cuda-graph --te-rng-tracker
    --inference-cuda-graph-scope none
    --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep --moe-enable-deepep
    --moe-permute-fusion-into-hybridep --moe-hybridep-pad-uneven-dispatch-inputs --moe-ncclep-static-shape
    --moe-ncclep-zero-copy --moe-flex-dispatcher-num-sms 3 --moe-deepep-num-sms 3 --moe-hybridep-num-sms 3
    --moe-hybridep-num-blocks-permute 3 --moe-hybridep-num-blocks-unpermute 3 --moe-permute-fusion
    --moe-router-fusion
    --delay-wgrad-compute --overlap-dispatch-backward-with-experts-wgrad
    --defer-embedding-wgrad-compute --wgrad-deferral-limit 2
    --fine-grained-activation-offloading --offload-modules attn_norm --delay-offload-until-cuda-graph
    --cpu-offloading-num-layers 1 --optimizer-cpu-offload --use-torch-optimizer-for-cpu-offload
    --overlap-cpu-optimizer-d2h-h2d --moe-paged-stash
    --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype fp16 --main-params-dtype fp16
    --main-grads-dtype bf16 --use-nccl-ub --disable-symmetric-registration --fsdp-manual-registration
    --use-sharp --sharp-enabled-group dp --nccl-communicator-config-path x --symmetric-ar-type two_shot
    --pipeline-model-parallel-comm-backend nccl --use-ring-exchange-p2p --high-priority-stream-groups dp ep
    --high-priority-a2a-comm-stream --gpu-sniff-test-interval 2 --batch-invariant-mode --tp-comm-overlap
    --use-te-activation-func --use-transformer-engine-op-fuser --fused-residual-rmsnorm --mla-down-proj-fusion
    --use-grouped-gemm-for-dense-mlp --use-grouped-gemm-for-shared-expert --moe-single-grouped-weight
    --moe-single-grouped-bias --flash-attention-version 3 --log-max-attention-logit
    --cross-entropy-fusion-impl te --deterministic-mode --use-megatron-fsdp --ckpt-format fsdp_dtensor
    --init-model-with-meta-device --attention-backend fused --record-memory-history
"""
EXCLUSIVE = {
    "enable_cuda_graph": ("--enable-cuda-graph", "True -> False"),
    "cuda_graph_scope_deprecated": ("--cuda-graph-impl local --cuda-graph-scope attn", "attn -> None"),
    "external_cuda_graph": ("--external-cuda-graph", "True -> False"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "True -> False"),
}
SAME = "--moe-token-dispatcher-type alltoall --use-distributed-optimizer"


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def arguments(flags):
    args, said = trials.parse(f"{trials.MODELS['moe']} {flags}")
    values = {
        name: value.name if isinstance(value, enum.Enum) else value for name, value in vars(args).items()
    }
    return values, said


def test_the_run_is_that_of_a_command_line_without():
    expected, _ = arguments(SAME)
    given, said = arguments(GIVEN)
    assert given == expected
    for name, *_ in (*COUNTERPARTS, *REPLACED):
        assert f"\n  {name} " in said or name in EXCLUSIVE, name


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_so_it_is_for_what_excludes_another(name):
    expected, _ = arguments("--use-distributed-optimizer" if "fsdp" in name else "")
    flags, change = EXCLUSIVE[name]
    given, said = arguments(flags)
    assert given == expected
    assert f"\n  {name} {change} (" in said


def test_what_comes_of_these_changes_is_not_put_to_megatron():
    args = trials.parser().parse_args(f"{trials.COMMON} {trials.MODELS['dense']}".split())
    args.rank, args.world_size = 0, 1
    adapt_arguments(args)
    args.fine_grained_activation_offloading = True
    problems = Problems()
    parsing._try(args, problems, {"transformer_impl"}, from_local=False)
    text, *_ = [text for text in problems.texts if "offloading" in text]
    assert text.startswith(
        "--device cpu can't have these flags, for it changes transformer_impl: "
        "--fine-grained-activation-offloading"
    )


def test_a_run_without_fp8_is_one_in_bf16():
    expected, _ = arguments("--bf16 --use-distributed-optimizer")
    given, said = arguments(
        "--fp8-format hybrid --fp8-recipe blockwise --fp8-param-gather --moe-router-padding-for-fp8 "
        "--reuse-grad-buf-for-mxfp8-param-ag --use-distributed-optimizer --without-fp8"
    )
    assert {**given, "without_fp8": False} == expected
    assert "--without-fp8: trains in bf16, without --fp8-format, --fp8-param-gather" in said
