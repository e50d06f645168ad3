"""Counts, from inside a training job, what each rank sends in its second step."""

import json
import os

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.training import get_args, training

from megatron_periln.plan.costs.collectives import CountCollectives

ARGUMENTS = [
    "context_parallel_size",
    "data_parallel_size",
    "expert_model_parallel_size",
    "global_batch_size",
    "grad_reduce_in_bf16",
    "hidden_size",
    "micro_batch_size",
    "num_experts",
    "overlap_param_gather",
    "padded_vocab_size",
    "pipeline_model_parallel_size",
    "seq_length",
    "sequence_parallel",
    "tensor_model_parallel_size",
    "untie_embeddings_and_output_weights",
    "use_distributed_optimizer",
    "virtual_pipeline_model_parallel_size",
]


def count_the_second_step():
    """Print a JSON line: what the step sent, the bytes of the buffers, and arguments."""
    train_step, build = training.train_step, _ParamAndGradBuffer.__init__
    buffers, steps = [], [0]

    def remember(self, *args, **kwargs):
        build(self, *args, **kwargs)
        gathered = 0 if self.param_data is None else self.param_data.numel() * self.param_dtype.itemsize
        reduced = self.grad_data.numel() * self.grad_data.element_size()
        buffers.append([self.data_parallel_group.group_desc, reduced, gathered])

    def counting(*args, **kwargs):
        steps[0] += 1
        if steps[0] != 2:
            return train_step(*args, **kwargs)
        with CountCollectives() as counted:
            result = train_step(*args, **kwargs)
        line = {
            "rank": int(os.environ["RANK"]),
            "sent": [[*key, count] for key, count in counted.sent.items()],
            "buffers": buffers,
            "args": {name: getattr(get_args(), name) for name in ARGUMENTS},
            "params_dtype": str(get_args().params_dtype).removeprefix("torch."),
        }
        print(f"\ncounted {json.dumps(line)}", flush=True)
        return result

    _ParamAndGradBuffer.__init__ = remember
    training.train_step = counting
