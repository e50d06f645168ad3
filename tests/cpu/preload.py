"""What processes of `tests.cpu.fresh` start with."""

from megatron_periln import cpu

cpu.activate()

import megatron.core.optimizer  # noqa: E402
import megatron.training.initialize  # noqa: E402, F401
