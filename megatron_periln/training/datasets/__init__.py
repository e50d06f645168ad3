"""The samples that a run trains on: its datasets, the cache of their indices, and their order."""
