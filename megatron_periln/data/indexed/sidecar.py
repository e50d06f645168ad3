"""What a dataset was made of: ``{prefix}.json`` beside ``{prefix}.bin`` and ``{prefix}.idx``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megatron_periln.data.indexed.index_arrays import IndexArrays
from megatron_periln.data.output_files import indented_json, writing
from megatron_periln.errors import PreprocessError
from megatron_periln.files import replacing

__all__ = [
    "FORMAT_VERSION",
    "Sidecar",
    "check_counts",
    "is_sidecar",
    "reference",
    "sha256_of",
    "sidecar_path",
    "utc_now",
]

FORMAT_VERSION = 1

MOST_BYTES = 1 << 28
"""Size of the largest file that is read as a sidecar: a corpus may be of that name."""

_TOKENIZER: dict[str, Any] = {
    "type": str,
    "digest": str | None,
    "vocab_size": int,
    "eod": int | None,
    "encoder": str,
}
_INPUT: dict[str, Any] = {"path": str, "bytes": int}
# What grows with the number of input files. It stands last, so that others need not read it.
_LISTS: dict[str, type] = {"command": list, "inputs": list, "plan": dict}
_INPUT_OF_PLAN = "the input"
_LATER: dict[str, type] = {"plan": dict, "listed_in": dict}
"""Fields that earlier versions did not write."""
_HEAD_BYTES = 1 << 16
_LISTED_IN: dict[str, Any] = {"file": str, "plan_sha256": str}
_SHA256: dict[str, Any] = {"bin": str, "idx": str}


@dataclass(frozen=True)
class Sidecar:
    """What a dataset holds, what it was made of, and by what.

    Parameters
    ----------
    documents, sequences, tokens
        Counts, as ``check_indexed_dataset`` returns them.
    dtype
        The dtype of the tokens, such as ``uint16``.
    bytes_read
        Size of the documents read, decompressed.
    skipped
        Number of documents skipped, for each reason.
    tokenizer
        ``type``, ``digest`` (of its files, or None), ``vocab_size``, ``eod`` (an id or None) and ``encoder``
        (what tokenized, such as ``megatron``).
    append_eod
        Whether each document ends with the end-of-document token.
    json_key
        The JSON key of the texts; several, joined by commas, if datasets of several were merged.
    inputs
        ``path`` and ``bytes`` of each input file.
    sha256
        Checksums in hex: ``bin`` and ``idx``.
    versions
        The version of each package that matters.
    command
        The command that wrote the dataset.
    created
        When, in ISO 8601, UTC.
    format_version
        Version of this format.
    plan
        What decided the bytes, by name; empty where several datasets were merged, and in older sidecars.
    parts
        How many datasets its run wrote for the key: more than one with ``--max-bin-size``.
    listed_in
        Where a run wrote several datasets for a key, all but the first have no ``command``, ``inputs`` and
        ``plan``, but here the ``file`` that has, the first one's sidecar in the same folder, and the
        ``plan_sha256`` of its plan: were the inputs listed in each, they would be datasets times inputs.
    """

    documents: int
    sequences: int
    tokens: int
    dtype: str
    bytes_read: int
    skipped: dict[str, int]
    tokenizer: dict[str, Any]
    append_eod: bool
    json_key: str
    inputs: list[dict[str, Any]]
    sha256: dict[str, str]
    versions: dict[str, str]
    command: list[str]
    created: str
    format_version: int = FORMAT_VERSION
    plan: dict[str, Any] = field(default_factory=dict)
    parts: int = 1
    listed_in: dict[str, str] = field(default_factory=dict)

    def write_to(self, path: Path) -> None:
        """Write to ``path`` as indented JSON.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        fields = dict(vars(self))
        lists = {name: fields.pop(name) for name in _LISTS}
        lists |= _inputs_once(self.inputs, self.plan)
        with path.open("wb") as stream:
            stream.writelines(chain(indented_json({**fields, **lists}), [b"\n"]))

    def write(self, path: str | Path) -> None:
        """Write to ``path``; an old file there is replaced at once.

        Raises
        ------
        PreprocessError
            If the file cannot be written.
        """
        with writing(path, "; nothing was left there"), replacing(Path(path)) as (temporary,):
            self.write_to(temporary)

    @classmethod
    def read(cls, path: str | Path) -> Sidecar:
        """Read ``path``; fields that this version does not know are ignored.

        Raises
        ------
        PreprocessError
            If the file cannot be read, is malformed, is of a newer format, or lacks a field.
        """
        return cls._of(path, lambda: json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def read_summary(cls, path: str | Path) -> Sidecar:
        """Read ``path`` as `read` does, but for what lists input files: ``inputs``, ``command`` and ``plan``.

        They may be tens of thousands, in every part of a dataset.
        """
        return cls._of(path, lambda: _summary(Path(path)))

    @classmethod
    def _of(cls, path: str | Path, load: Callable[[], Any]) -> Sidecar:
        try:
            if (size := Path(path).stat().st_size) > MOST_BYTES:
                raise PreprocessError(f"{path}: {size} bytes, too many for the sidecar of a dataset")
            content = load()
        except OSError as error:
            raise PreprocessError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise PreprocessError(f"{path}: malformed JSON: {error}; preprocess the corpus again") from error
        if not isinstance(content, dict):
            raise PreprocessError(f"{path}: not a JSON object, so not the sidecar of a dataset")
        for name, kind in _LATER.items():
            content.setdefault(name, kind())
        version = content.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise PreprocessError(
                f"{path}: format version {version}, only {FORMAT_VERSION} and older can be read; "
                f"update megatron-periln"
            )
        _check_fields(path, content, get_type_hints(cls), "")
        _check_fields(path, content["tokenizer"], _TOKENIZER, "tokenizer.")
        _check_fields(path, content["sha256"], _SHA256, "sha256.")
        for number, item in enumerate(content["inputs"]):
            _check_fields(path, item, _INPUT, f"inputs[{number}].")
        if content["listed_in"]:
            _check_fields(path, content["listed_in"], _LISTED_IN, "listed_in.")
        content |= _inputs_twice(content["inputs"], content["plan"])
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})


def reference(path: Path, plan: dict[str, Any]) -> dict[str, str]:
    """Return ``listed_in`` of a sidecar whose command, inputs and plan stand in that at ``path``."""
    # Sorted, and as JSON, so that what was read from a file has the same.
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    return {"file": path.name, "plan_sha256": digest.hexdigest()}


def _inputs_once(inputs: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the two lists as a file has them: what the plan says of an input stands with the input."""
    files = plan.get(_INPUT_OF_PLAN)
    if not files or len(files) != len(inputs):
        return {}
    try:
        merged = [
            {"path": path, "bytes": size, "format": form, "modified": modified}
            for path, form, size, modified in files
        ]
    except (TypeError, ValueError):  # no files
        return {}
    if any(
        {"path": one["path"], "bytes": one["bytes"]} != item for one, item in zip(merged, inputs, strict=True)
    ):
        return {}
    rest = {name: value for name, value in plan.items() if name != _INPUT_OF_PLAN}
    return {"inputs": merged, "plan": rest}


def _inputs_twice(inputs: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """Return what `_inputs_once` has joined."""
    if not plan or _INPUT_OF_PLAN in plan or not inputs or not all("modified" in item for item in inputs):
        return {}
    files = [[item["path"], item.get("format"), item["bytes"], item["modified"]] for item in inputs]
    return {
        "inputs": [{"path": item["path"], "bytes": item["bytes"]} for item in inputs],
        "plan": {_INPUT_OF_PLAN: files, **plan},
    }


def _summary(path: Path) -> Any:
    with path.open("rb") as stream:
        head, found, _ = stream.read(_HEAD_BYTES).partition(f',\n  "{next(iter(_LISTS))}": '.encode())
    content = {name: kind() for name, kind in _LISTS.items()}
    if found:
        content |= json.loads(head + b"}")
    if content.keys() | _LATER.keys() >= {field.name for field in dataclasses.fields(Sidecar)}:
        return content
    return json.loads(path.read_text(encoding="utf-8"))  # of an earlier version, or no sidecar


def sidecar_path(prefix: str | Path) -> Path:
    """Return the path of the sidecar of the dataset at ``prefix``."""
    return Path(f"{prefix}.json")


def is_sidecar(path: str | Path) -> bool:
    """Whether the file at ``path`` is a sidecar that can be read."""
    try:
        Sidecar.read(path)
    except PreprocessError:
        return False
    return True


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


def sha256_of(path: str | Path, block: int = 1 << 22) -> str:
    """Return the SHA-256 of a file in hex, reading ``block`` bytes at a time.

    Raises
    ------
    PreprocessError
        If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb", buffering=0) as stream:
            while chunk := stream.read(block):
                digest.update(chunk)
    except OSError as error:
        raise PreprocessError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def utc_now() -> str:
    """Return the time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_fields(path: str | Path, content: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    for name, kind in fields.items():
        if name not in content:
            raise PreprocessError(
                f"{path}: field {where + name!r} is missing; restore the file or preprocess the corpus again"
            )
        if not _is_of(content[name], kind):
            raise PreprocessError(
                f"{path}: field {where + name!r} is {json.dumps(content[name])[:60]}, "
                f"not {_name_of(kind)}; restore the file or preprocess the corpus again"
            )


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value read from JSON is of a type; a boolean is no integer."""
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is_of(item, get_args(kind)[1]) for item in value.values())
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is types.UnionType:
        return any(_is_of(value, choice) for choice in get_args(kind))
    return kind is Any or type(value) is kind


def _name_of(kind: Any) -> str:
    names = {int: "an integer", str: "a string", bool: "true or false", types.NoneType: "null"}
    if get_origin(kind) is types.UnionType:
        return " or ".join(names[choice] for choice in get_args(kind))
    if get_origin(kind) is list:
        return "a list" if get_args(kind)[0] not in names else f"a list, each {names[get_args(kind)[0]]}"
    if get_origin(kind) is dict:
        return "an object" if get_args(kind)[1] is Any else f"an object, each {names[get_args(kind)[1]]}"
    return names[kind]
