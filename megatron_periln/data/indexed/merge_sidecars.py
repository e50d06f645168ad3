"""The sidecar of a merged dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatron_periln.data.indexed.index_arrays import IndexArrays
from megatron_periln.data.indexed.sidecar import FORMAT_VERSION, Sidecar, sidecar_path, utc_now
from megatron_periln.errors import PreprocessError

__all__ = ["check_counts", "merge_sidecars"]


def merge_sidecars(datasets: Sequence[IndexArrays], command: Sequence[str]) -> Sidecar | None:
    """Return the sidecar of the datasets merged, without checksums; None if one of them has none.

    Raises
    ------
    PreprocessError
        If a sidecar is not that of its dataset, or the datasets were tokenized in different ways.
    """
    paths = [sidecar_path(dataset.prefix) for dataset in datasets]
    sidecars = []
    for path, dataset in zip(paths, datasets, strict=True):
        if path.exists():
            sidecars.append(Sidecar.read(path))
            check_counts(sidecars[-1], dataset)
    first_path = next((path for path in paths if path.exists()), None)
    for path, sidecar in zip((path for path in paths if path.exists()), sidecars, strict=True):
        for what, here, there in (
            ("tokenizer", _identity(sidecars[0]), _identity(sidecar)),
            ("append_eod", sidecars[0].append_eod, sidecar.append_eod),
        ):
            if here != there:
                raise PreprocessError(
                    f"{path}: {what} is {there}, but {here} in {first_path}: "
                    f"preprocess all datasets with the same tokenizer flags"
                )
    if len(sidecars) < len(datasets):
        return None
    skipped: Counter[str] = Counter()
    for sidecar in sidecars:
        skipped.update(sidecar.skipped)
    packages = dict.fromkeys(name for sidecar in sidecars for name in sidecar.versions)
    return replace(
        sidecars[0],
        documents=sum(sidecar.documents for sidecar in sidecars),
        sequences=sum(sidecar.sequences for sidecar in sidecars),
        tokens=sum(sidecar.tokens for sidecar in sidecars),
        bytes_read=sum(sidecar.bytes_read for sidecar in sidecars),
        skipped=dict(skipped),
        json_key=_join(sidecar.json_key for sidecar in sidecars),
        inputs=list({item["path"]: item for sidecar in sidecars for item in sidecar.inputs}.values()),
        sha256={},
        versions={
            name: _join(sidecar.versions[name] for sidecar in sidecars if name in sidecar.versions)
            for name in packages
        },
        command=list(command),
        created=utc_now(),
        format_version=FORMAT_VERSION,
        plan={},
    )


def check_counts(sidecar: Sidecar, dataset: IndexArrays) -> None:
    """Check that a sidecar's dtype and counts are those of its dataset.

    Raises
    ------
    PreprocessError
        Naming the sidecar and what differs.
    """
    for what, there, here in (
        ("dtype", sidecar.dtype, dataset.info.dtype.name),
        ("documents", sidecar.documents, dataset.info.documents),
        ("sequences", sidecar.sequences, dataset.info.sequences),
        ("tokens", sidecar.tokens, dataset.info.tokens),
    ):
        if here != there:
            raise PreprocessError(
                f"{sidecar_path(dataset.prefix)}: {what} is {there}, but {here} in {dataset.idx.name}: "
                f"one of them is of another dataset; copy both again, or remove the sidecar"
            )


def _identity(sidecar: Sidecar) -> tuple[object, ...]:
    """Return what two tokenizers must share to give the same ids, whatever runs them."""
    return tuple(sidecar.tokenizer[name] for name in ("type", "digest", "vocab_size", "eod"))


def _join(values: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(values))
