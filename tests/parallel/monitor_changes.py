"""Changes to monitored jobs, made by every rank: what tests must see, and mistakes they must notice."""

import json
import sys
from pathlib import Path

COUNTS = "counts.json"


def keep_counts():
    """Write beside the record how often tokens were counted, and two norms of all gradients."""
    from megatron_periln.monitor import install

    write = install.RunMonitor.write
    groups = ("stream", "angle", "attention", "mlp")
    kept = []

    def keeping(self, iteration, losses, grad_norm, learning_rate):
        if (sums := self.collector.sums) is not None:
            entry = {"iteration": iteration, "grad_norm": float(grad_norm), "norm": sums.gradient_norm()}
            kept.append({**entry, "tokens": {group: sums.counts(group)[:-1] for group in groups}})
            Path(self.args.monitor_file).with_name(COUNTS).write_text(json.dumps(kept))
        return write(self, iteration, losses, grad_norm, learning_rate)

    install.RunMonitor.write = keeping


def forbid_the_monitor():
    """Make whatever would install the monitor fail."""
    sys.modules["megatron_periln.monitor.install"] = None


def count_recomputation():
    """Count what the backward pass computes again."""
    from megatron_periln.monitor import hooks

    hooks.recomputing = lambda: False


def count_on_all_tensor_ranks():
    """Count tokens that all tensor-parallel ranks hold on each of them."""
    from megatron_periln.monitor import collector

    collector.mpu = _Changed(collector.mpu, get_tensor_model_parallel_rank=lambda: 0)


def count_shared_parameters_on_all_tensor_ranks():
    """Count parameters that the tensor-parallel ranks share on each of them."""
    from megatron_periln.monitor import gradients

    gradients.param_is_not_tensor_parallel_duplicate = lambda *_, **__: True


def count_all_of_each_bucket():
    """Count gradients that the distributed optimizer has not reduced to this rank."""
    from megatron_periln.monitor import gradients

    def all_pieces(chunk):
        for group in chunk.bucket_groups:
            for parameter in group.params:
                yield parameter, parameter.main_grad

    gradients.own_pieces = all_pieces


def forget_the_data_parallel_size():
    """Leave the residual stream's gradient as each replica has it."""
    from megatron_periln.monitor import collector

    collector.mpu = _Changed(collector.mpu, get_data_parallel_world_size=lambda **_: 1)


def raise_a_spike_in_iteration_three():
    """Raise an alert of a loss spike."""
    from megatron_periln.monitor import install

    class Watch(install.Watch):
        def step(self, iteration, loss, grad_norm):
            spike = install.Alert(iteration, "loss-spike", "a spike made by a test", value=loss)
            return [spike] if iteration == 3 else []

    install.Watch = Watch


def poison_the_second_layer_in_iteration_three():
    """Make a weight of layer 2 NaN."""
    import torch
    from megatron.core.utils import unwrap_model

    from megatron_periln.monitor import install

    begin = install.RunMonitor.begin

    def poisoning(self, iteration, forward_backward, model, optimizer):
        for chunk in unwrap_model(model):
            for layer in chunk.decoder.layers:
                if iteration == 3 and layer.layer_number == 2:
                    with torch.no_grad():
                        layer.mlp.linear_fc2.weight[0, 0] = torch.nan
        return begin(self, iteration, forward_backward, model, optimizer)

    install.RunMonitor.begin = poisoning


class _Changed:
    def __init__(self, module, **changes):
        self.__dict__.update(changes)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)
