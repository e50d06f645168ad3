"""The end of a run: its datasets get their final names, and what describes them."""

from __future__ import annotations

from collections import Counter
from importlib import metadata
from itertools import count
from pathlib import Path

from megatron_periln.data.indexed.sidecar import Sidecar, utc_now
from megatron_periln.data.output_files import writing
from megatron_periln.data.preprocess.outputs import Outputs
from megatron_periln.data.preprocess.placer import Dataset
from megatron_periln.data.preprocess.plan import Plan, dataset_prefix, quarantine_file
from megatron_periln.data.preprocess.quarantine import number_lines, write_quarantine
from megatron_periln.data.preprocess.writer import publish

__all__ = ["publish_all"]

_PACKAGES = (
    "megatron-periln",
    "megatron-core",
    "gigatoken",
    "tokenizers",
    "transformers",
    "sentencepiece",
    "tiktoken",
)


def publish_all(plan: Plan, outputs: Outputs, checksums: dict[str, str], encoder: str) -> list[Path]:
    """Give every dataset of a complete run its final name, and write what was put in quarantine.

    Parameters
    ----------
    plan
        What the run was to do.
    outputs
        What it has written.
    checksums
        The SHA-256 of the growing .bin files that are known, by path.
    encoder
        The name of what encoded.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    PreprocessError
        If a file cannot be written.
    """
    files: list[Path] = []
    for dataset, sidecar in _sidecars(plan, outputs, encoder).items():
        key, number = dataset
        prefix = dataset_prefix(
            plan.output_prefix,
            key,
            sentences=plan.split is not None,
            number=number if plan.max_bin_size else None,
        )
        stem = outputs.stem(dataset)
        files += publish(stem, prefix, outputs.dtype, checksums.get(f"{stem}.bin"), sidecar)
    if plan.max_bin_size:
        _remove_outdated(plan, outputs)
    if plan.on_error == "quarantine" and any(record.left_out for record in outputs.records):
        path, growing = quarantine_file(plan.output_prefix), outputs.folder / "quarantine"
        write_quarantine(growing, number_lines(outputs.bad))
        with writing(path):
            growing.replace(path)
        files.append(path)
    return files


def _remove_outdated(plan: Plan, outputs: Outputs) -> None:
    """Remove the datasets of an earlier run that had more of them."""
    for key, numbers in Counter(key for key, _ in outputs.datasets()).items():
        for number in count(numbers):
            prefix = dataset_prefix(plan.output_prefix, key, sentences=plan.split is not None, number=number)
            if not Path(f"{prefix}.bin").exists():
                break
            for suffix in (".idx", ".json", ".bin"):
                Path(prefix + suffix).unlink(missing_ok=True)


def _sidecars(plan: Plan, outputs: Outputs, encoder: str) -> dict[Dataset, Sidecar]:
    """Return what describes each dataset, but for its checksums."""
    sizes = outputs.datasets()
    bytes_read, left_out = Counter[Dataset](), {dataset: Counter[str]() for dataset in sizes}
    for record, starts in outputs.placed():
        for dataset in starts.keys() & sizes.keys():
            bytes_read[dataset] += record.bytes
            left_out[dataset].update(record.left_out)
    tokenizer = {
        "type": plan.tokenizer_type,
        "digest": plan.tokenizer.digest,
        "vocab_size": plan.tokenizer.vocab_size,
        "eod": plan.tokenizer.eod,
        "encoder": encoder,
    }
    created, versions, parts = utc_now(), _versions(), Counter(key for key, _ in sizes)
    return {
        dataset: Sidecar(
            documents=size.documents,
            sequences=size.sequences,
            tokens=size.tokens,
            dtype=str(outputs.dtype),
            bytes_read=bytes_read[dataset],
            skipped=dict(left_out[dataset]),
            tokenizer=tokenizer,
            append_eod=plan.append_eod,
            json_key=dataset[0],
            inputs=[{"path": file.path, "bytes": file.bytes} for file in plan.inputs],
            sha256={},
            versions=versions,
            command=plan.command,
            created=created,
            plan=plan.identity(outputs.dtype),
            parts=parts[dataset[0]],
        )
        for dataset, size in sizes.items()
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
