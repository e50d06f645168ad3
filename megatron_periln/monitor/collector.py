"""One monitored iteration: hooks on, forward and backward passes, hooks off, one reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_periln.monitor.gradients import add_parameter_gradients
from megatron_periln.monitor.hooks import watched
from megatron_periln.monitor.layer_sums import Sums
from megatron_periln.monitor.settings import chosen_layers

__all__ = ["Collector"]


class Collector:
    """Collects the statistics of the iterations whose forward and backward passes it wraps.

    Parameters
    ----------
    choice
        ``--monitor-layers``.

    Attributes
    ----------
    sums
        Of the last wrapped iteration, reduced over all ranks.
    layers
        The layers that were monitored.

    Notes
    -----
    A token counts once: on one tensor-parallel rank where all hold it, and on each rank that holds
    a part of the sequence (sequence and context parallelism) or of the batch. The gradient of the
    residual stream is that of the loss Megatron minimizes, the mean over the global batch: the
    passes' own gradient carries the loss scale, and lacks the division by the data- and
    context-parallel size (or, with ``--calculate-per-token-loss``, by the number of tokens) that
    Megatron does where it reduces parameters' gradients.
    """

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.layers: list[int] = []
        self.sums: Sums | None = None

    def wrap(self, forward_backward: Callable[..., Any], model: list[nn.Module], optimizer: Any) -> Any:
        """Return ``forward_backward``, one of Megatron's pipeline schedules, with statistics collected.

        It returns after ``finalize_model_grads``, and Megatron's ``train_step`` calls it before the
        optimizer's step.
        """

        def collecting(*args: Any, **kwargs: Any) -> Any:
            chunks = unwrap_model(model)
            config = chunks[0].config
            self.layers = chosen_layers(self.choice, config.num_layers)
            self.sums = sums = Sums(config.num_layers)
            first = mpu.get_tensor_model_parallel_rank() == 0
            seen = self.layers if first or config.sequence_parallel else []
            with watched(chunks, sums, seen):
                losses = forward_backward(*args, **kwargs)
            loss_scale = optimizer.get_loss_scale().clone()
            add_parameter_gradients(model, sums, loss_scale)
            if first:
                for microbatch in losses:
                    sums.add("loss", sums.rest, microbatch["lm loss"][1].detach())
            sums.reduce()
            if config.calculate_per_token_loss:
                divisor = sums.total("loss")[0]
            else:
                divisor = mpu.get_data_parallel_world_size(with_context_parallel=True)
            sums.scale("stream_gradient", (loss_scale.squeeze() * divisor).double() ** -2)
            return losses

        return collecting
