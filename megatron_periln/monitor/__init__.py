"""Statistics of the residual stream and of gradients during training: ``--monitor-layers``."""
