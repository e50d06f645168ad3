"""How a training process ends: with its launcher, in bounded time, and with no process of its own left."""
