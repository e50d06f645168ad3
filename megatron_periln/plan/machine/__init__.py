"""The machine that a run is planned for: its GPUs, and the links between them."""
