"""Corpora to Megatron's indexed datasets, and checks of the datasets that training reads."""

from megatron_periln.data.indexed.format import IndexedDatasetError, IndexedDatasetInfo, check_indexed_dataset

__all__ = ["IndexedDatasetError", "IndexedDatasetInfo", "check_indexed_dataset"]
