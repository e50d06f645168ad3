"""Runs that have finished, so that the same command with ``--resume`` has nothing left to do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_periln.data.indexed.index_arrays import IndexArrays
from megatron_periln.data.indexed.merge_sidecars import check_counts
from megatron_periln.data.indexed.sidecar import Sidecar, sidecar_path
from megatron_periln.data.preprocess.plan import Plan, dataset_prefix, difference, growing_folder
from megatron_periln.data.tokenizers.encoders import token_dtype
from megatron_periln.errors import PreprocessError

__all__ = ["check_finished", "is_finished"]


def is_finished(output_prefix: str, prefixes: Sequence[str]) -> bool:
    """Whether every dataset stands there with its sidecar, and no run is unfinished."""
    files = [prefix + suffix for prefix in prefixes for suffix in (".bin", ".idx", ".json")]
    return not growing_folder(output_prefix).exists() and all(Path(file).exists() for file in files)


def check_finished(plan: Plan) -> str:
    """Check that a run of ``plan`` wrote every dataset of it; return a line that says so.

    Raises
    ------
    PreprocessError
        If another plan wrote one, or its sidecar does not say which, or is that of another dataset.
    IndexedDatasetError
        If Megatron cannot read one.
    """
    now = plan.identity(token_dtype(plan.tokenizer.vocab_size))
    prefixes = [prefix for key in plan.keys for prefix in _prefixes(plan, key)]
    for prefix in prefixes:
        sidecar = Sidecar.read(sidecar_path(prefix))
        changed = difference(sidecar.plan, now) if sidecar.plan else "nothing tells how it was made"
        if not plan.rereadable:
            changed = "a pipe cannot be read again to compare"
        if changed:
            raise PreprocessError(
                f"{prefix}.bin exists, and not by this command: {changed}; "
                f"choose another --output-prefix or pass --overwrite"
            )
        check_counts(sidecar, IndexArrays.open(prefix, may_be_empty=plan.shard[1] > 1))
    return f"Nothing to do: the run has finished before: {' '.join(prefixes)}"


def _prefixes(plan: Plan, key: str) -> list[str]:
    prefix_of = partial(dataset_prefix, plan.output_prefix, key, sentences=plan.split is not None)
    if not plan.max_bin_size:
        return [prefix_of(number=None)]
    parts = Sidecar.read(sidecar_path(prefix_of(number=0))).parts
    return [prefix_of(number=number) for number in range(parts)]
