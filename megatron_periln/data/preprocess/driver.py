"""The driver: input files through worker processes into indexed datasets."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

from megatron_periln.data.preprocess.checksums import GrowingChecksums, Growth
from megatron_periln.data.preprocess.encode import ChunkEncoder
from megatron_periln.data.preprocess.finalize import publish_all
from megatron_periln.data.preprocess.journal import Location, Record
from megatron_periln.data.preprocess.outputs import Outputs
from megatron_periln.data.preprocess.plan import Plan, Summary, dataset_prefix, growing_folder
from megatron_periln.data.preprocess.progress import Progress
from megatron_periln.data.preprocess.quarantine import number_lines
from megatron_periln.data.preprocess.worker import Report
from megatron_periln.data.preprocess.workers import encode_and_write
from megatron_periln.data.readers.inputs import Source, sources, take_shard, to_tasks
from megatron_periln.data.tokenizers.encoders import Choice, choose_encoder, token_dtype
from megatron_periln.data.tokenizers.megatron_tokenizer import end_of_document
from megatron_periln.errors import PreprocessError

__all__ = ["preprocess"]


def preprocess(plan: Plan, log_interval: int | None = None) -> Summary:
    """Encode documents into one indexed dataset for each key.

    Progress goes to stderr. The datasets appear when all are complete. A run that fails leaves
    what it has done in ``{output_prefix}.partial``, for one with ``resume``.

    Parameters
    ----------
    plan
        What to do.
    log_interval
        Number of documents between two lines of progress where stderr is not a terminal.

    Raises
    ------
    PreprocessError
        If the input is empty or cannot be read, a document cannot be encoded, workers die, or an
        output cannot be written.
    """
    return _Run(plan, log_interval).run()


class _EncoderDiffersError(Exception):
    """The encoder does not do what its reference does."""


class _NothingToKeepError(PreprocessError):
    """What was done is of no use."""


class _Run:
    def __init__(self, plan: Plan, log_interval: int | None) -> None:
        self.plan = plan
        self.started = time.monotonic()
        self.dtype = token_dtype(plan.tokenizer.vocab_size)
        self.choice = choose_encoder(plan.tokenizer, plan.encoder)
        self.sources = self._sources()
        self.progress = Progress(sum(source.weight for source in self.sources), log_interval)

    def run(self) -> Summary:
        plan = self.plan
        encoder = self._encoder()
        self.outputs = Outputs(
            growing_folder(plan.output_prefix), self.dtype, plan.identity(self.dtype), plan.max_bin_size
        )
        keep = plan.rereadable
        try:
            self.outputs.open(resume=plan.resume, overwrite=plan.overwrite)
            self._check_quarantine()
            if self.outputs.encoder and not plan.encoder:
                self.choice = choose_encoder(plan.tokenizer, self.outputs.encoder)
                encoder = self._encoder()
            self.checksums = GrowingChecksums()
            if not self.outputs.complete:
                try:
                    self._encode(encoder)
                except _EncoderDiffersError as error:
                    self._fall_back(error)
                    self._encode(self._encoder())
                self._check_tokens()
                self.outputs.end()
            if not self.outputs.records:
                self.progress.note("--shard {}/{} has no input: fewer would do".format(*plan.shard))
                self.outputs.make_empty(plan.keys)
            files = publish_all(plan, self.outputs, self.checksums.result(), self.choice.encoder.name)
            keep = False
        except _NothingToKeepError:
            keep = False
            raise
        except (PreprocessError, KeyboardInterrupt) as error:
            if keep and self.outputs.records:
                reason = f"{error}; " if str(error) else ""
                raise type(error)(f"{reason}what is done is kept: go on with --resume") from error
            raise
        finally:
            self.progress.close()
            self.outputs.close(remove=not keep)
        return self._summary(files)

    def _sources(self) -> list[Source]:
        plan = self.plan
        if plan.partitions > 1 and not plan.rereadable:
            raise PreprocessError(
                "--partitions reads the input once for each, so it cannot be a pipe: "
                "use files or --keep-sequential-samples"
            )
        if plan.resume and not plan.rereadable and growing_folder(plan.output_prefix).exists():
            raise PreprocessError("--resume: a pipe cannot be read again; start anew with --overwrite")
        found = sources(plan.inputs, plan.keys, plan.chunk_bytes)
        shard, shards = plan.shard
        return take_shard(found, shard, shards) if shards > 1 else found

    def _encoder(self) -> ChunkEncoder:
        plan = self.plan
        return ChunkEncoder(
            self.choice.encoder,
            plan.keys,
            self.dtype,
            reference=self.choice.reference,
            eod=end_of_document(plan.tokenizer) if plan.append_eod else None,
            split=plan.split,
            stop=plan.on_error == "stop",
            keep_bad=plan.on_error != "skip",
            limit=plan.max_document_bytes,
        )

    def _encode(self, encoder: ChunkEncoder) -> None:
        """Encode what is not written yet."""
        plan, outputs = self.plan, self.outputs
        for note in self.choice.notes:
            self.progress.note(note)
        first = len(outputs.records)
        growth = Growth(outputs, self.checksums)
        for record in outputs.records:
            self._show(record, new=False)
        tasks = islice(to_tasks(self.sources, plan.partitions, plan.max_document_bytes), first, None)
        written = encode_and_write(
            encoder, tasks, self._place, plan.workers, first=first, warn=self.progress.note
        )
        with closing(written):
            for chunk in written:
                record = Record(
                    number=chunk.number,
                    sizes=chunk.report.sizes,
                    checksums=chunk.checksums,
                    empty=chunk.report.empty,
                    bytes=chunk.report.bytes,
                    weight=chunk.task.chunk.weight // plan.partitions,
                    left_out=chunk.report.left_out,
                    bad=chunk.report.bad,
                )
                outputs.add(record)
                self._show(record)
                growth.advance()
        growth.advance()

    def _place(self, report: Report) -> dict[str, Location]:
        if report.difference:
            raise _EncoderDiffersError(report.difference)
        if report.bad and self.plan.on_error == "stop":
            (bad,) = number_lines(lambda: report.bad[:1])
            raise PreprocessError(f"{bad}; --on-error skip or quarantine leaves such documents out")
        return self.outputs.place(report.sizes)

    def _check_quarantine(self) -> None:
        """Refuse to go on where documents that belong in quarantine were not kept."""
        left_out = sum(sum(record.left_out.values()) for record in self.outputs.records)
        if left_out and self.plan.on_error == "quarantine" and left_out > sum(1 for _ in self.outputs.bad()):
            raise PreprocessError(
                f"{self.outputs.folder}: documents were left out with --on-error skip, so they cannot be put "
                f"in quarantine; run as before, or start anew with --overwrite"
            )

    def _fall_back(self, error: _EncoderDiffersError) -> None:
        name, reference = self.choice.encoder.name, self.choice.reference
        assert reference
        if self.plan.encoder:
            raise _NothingToKeepError(f"--encoder {name} is not exact: {error}; drop it") from error
        if not self.plan.rereadable:
            raise _NothingToKeepError(
                f"the encoder {name} is not exact: {error}; run again with --encoder {reference.name}"
            ) from error
        self.progress.note(f"the encoder {name} is not exact, starting again with {reference.name}: {error}")
        self.choice = Choice(reference, None)
        self.progress.reset()
        self.checksums = GrowingChecksums()
        self.outputs.restart(reference.name)

    def _check_tokens(self) -> None:
        """Refuse what Megatron cannot map; a shard may be empty, as long as not all are."""
        if self.plan.shard[1] > 1:
            return
        tokens = Counter[str]()
        for (key, _), size in self.outputs.datasets().items():
            tokens[key] += size.tokens
        for key in self.plan.keys:
            if not any(record.sizes[key].documents or record.left_out for record in self.outputs.records):
                names = " ".join(file.path for file in self.plan.inputs)
                raise _NothingToKeepError(f"no documents: {names} is empty")
            if not tokens[key]:
                name = dataset_prefix(self.plan.output_prefix, key, sentences=self.plan.split is not None)
                left_out = (
                    " or was left out" if any(record.left_out for record in self.outputs.records) else ""
                )
                raise _NothingToKeepError(
                    f"{name}: every document is empty{left_out}, so there are no tokens to write"
                )

    def _summary(self, files: list[Path]) -> Summary:
        records = self.outputs.records
        return Summary(
            documents=sum(record.sizes[self.plan.keys[0]].documents for record in records),
            tokens=sum(size.tokens for record in records for size in record.sizes.values()),
            bytes=sum(record.bytes for record in records),
            empty=sum(number for record in records for number in record.empty.values()),
            left_out=dict(sum((Counter(record.left_out) for record in records), Counter())),
            encoder=self.choice.encoder.name,
            seconds=time.monotonic() - self.started,
            files=files,
        )

    def _show(self, record: Record, *, new: bool = True) -> None:
        sizes = record.sizes.values()
        self.progress.add(
            weight=record.weight,
            documents=next(iter(sizes)).documents,
            bytes=record.bytes,
            tokens=sum(size.tokens for size in sizes),
            errors=sum(record.left_out.values()),
            new=new,
        )
