"""The driver: input files through worker processes into indexed datasets."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

from megatron_periln.data.preprocess.checker import Checker, InexactEncoderError
from megatron_periln.data.preprocess.checksums import RunningChecksums
from megatron_periln.data.preprocess.encode import ChunkEncoder
from megatron_periln.data.preprocess.finalize import finalize_run
from megatron_periln.data.preprocess.journal import Record
from megatron_periln.data.preprocess.partial_outputs import Location, PartialOutputs
from megatron_periln.data.preprocess.plan import Plan, Summary, partial_folder
from megatron_periln.data.preprocess.progress import Progress
from megatron_periln.data.preprocess.workers import Report, encode_and_write
from megatron_periln.data.readers.opening import number_lines
from megatron_periln.data.readers.parquet import RowStream
from megatron_periln.data.readers.sources import Source
from megatron_periln.data.readers.tasks import cut_into_sources, take_shard, to_tasks
from megatron_periln.data.readers.together import SmallSources, together
from megatron_periln.data.tokenizers.encoders import (
    ChosenEncoder,
    GuardedEncoder,
    PiecewiseEncoder,
    choose_encoder,
    likely_reference,
    token_dtype,
)
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
    with closing(Checker()) as checker:
        # First of all, so that it loads its library while this process loads the encoder.
        checker.use(likely_reference(plan.tokenizer, plan.encoder))
        return _Preprocessing(plan, checker, log_interval).run()


class _NothingToKeepError(PreprocessError):
    """What was done is of no use."""


class _Preprocessing:
    """One run, from the plan to the datasets."""

    def __init__(self, plan: Plan, checker: Checker, log_interval: int | None) -> None:
        self.plan, self.checker = plan, checker
        self.started = time.monotonic()
        self.dtype = token_dtype(plan.tokenizer.vocab_size)
        self.choice = choose_encoder(plan.tokenizer, plan.encoder)
        sources = self._sources()
        self.sources = together(sources, plan.chunk_bytes)
        identity = plan.identity(self.dtype)
        # Not as versions before this one: the chunks of their journals are others.
        kinds = {SmallSources: "small files together", RowStream: "row groups in parts"}
        if cut := [name for kind, name in kinds.items() if any(isinstance(s, kind) for s in self.sources)]:
            identity["the size of a chunk"] = [plan.chunk_bytes, *cut]
        self.progress = Progress(sum(source.weight for source in sources), log_interval)
        checker.warn = self.progress.note
        self.encoder = self._chunk_encoder()
        self.outputs = PartialOutputs(
            partial_folder(plan.output_prefix), self.dtype, identity, plan.max_bin_size
        )
        self.checksums = RunningChecksums()

    def run(self) -> Summary:
        """Open the partial datasets, encode what is missing of them, and finalize them."""
        outputs, keep = self.outputs, self.plan.rereadable
        try:
            self._open_outputs()
            if not outputs.complete:
                self._encode()
                self.checker.close()
                self._check_tokens()
                outputs.mark_complete()
            if not outputs.records:
                self.progress.note("--shard {}/{} has no input: fewer would do".format(*self.plan.shard))
                outputs.make_empty(self.plan.keys)
            files = finalize_run(self.plan, outputs, self.checksums.result(), self.choice.encoder.name)
            keep = False
        except _NothingToKeepError:
            keep = False
            raise
        except (PreprocessError, KeyboardInterrupt) as error:
            if keep and outputs.records:
                reason = f"{error}; " if str(error) else ""
                raise type(error)(f"{reason}what is done is kept: go on with --resume") from error
            raise
        finally:
            self.progress.close()
            outputs.close(remove=not keep)
        return self._summary(files)

    def _sources(self) -> list[Source]:
        plan = self.plan
        if plan.partitions > 1 and not plan.rereadable:
            raise PreprocessError(
                "--partitions reads the input once for each, so it cannot be a pipe: "
                "use files or --keep-sequential-samples"
            )
        if plan.resume and not plan.rereadable and partial_folder(plan.output_prefix).exists():
            raise PreprocessError("--resume: a pipe cannot be read again; start anew with --overwrite")
        sources = cut_into_sources(plan.inputs, plan.keys, plan.chunk_bytes)
        shard, shards = plan.shard
        return take_shard(sources, shard, shards) if shards > 1 else sources

    def _chunk_encoder(self) -> ChunkEncoder:
        plan, encoder = self.plan, self.choice.encoder
        return ChunkEncoder(
            PiecewiseEncoder(encoder, plan.tokenizer, limited=not plan.any_size),
            plan.keys,
            self.dtype,
            guarded=encoder if isinstance(encoder, GuardedEncoder) else None,
            sampled=self.choice.reference is not None,
            eod=end_of_document(plan.tokenizer) if plan.append_eod else None,
            split=plan.split,
            stop=plan.on_error == "stop",
            keep_bad=plan.on_error != "skip",
            limit=plan.max_document_bytes,
        )

    def _open_outputs(self) -> None:
        plan, outputs = self.plan, self.outputs
        outputs.open(resume=plan.resume, overwrite=plan.overwrite)
        skipped = sum(outputs.records.total().skipped.values())
        if skipped and plan.on_error == "quarantine" and skipped > sum(1 for _ in outputs.bad_documents()):
            raise PreprocessError(
                f"{outputs.folder}: documents were skipped with --on-error skip, so they cannot be put "
                f"in quarantine; run as before, or start anew with --overwrite"
            )
        if outputs.encoder and not plan.encoder:
            self.choice = choose_encoder(plan.tokenizer, outputs.encoder)
            self.encoder = self._chunk_encoder()

    def _encode(self) -> None:
        """Encode what is not written yet; all, if the encoder turns out not to be exact."""
        try:
            self._encode_chunks()
        except InexactEncoderError as error:
            self._fall_back(error)
            self._encode_chunks()

    def _encode_chunks(self) -> None:
        plan, outputs = self.plan, self.outputs
        for note in self.choice.notes:
            self.progress.note(note)
        if outputs.records:
            self._show(outputs.records.total(), new=False)
        first = len(outputs.records)
        tasks = islice(to_tasks(self.sources, plan.partitions, plan.max_document_bytes), first, None)
        self.checker.use(self.choice.reference)
        written = encode_and_write(
            self.encoder,
            tasks,
            self._place,
            plan.workers,
            checker=self.checker,
            first=first,
            warn=self.progress.note,
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
                    skipped=chunk.report.skipped,
                    bad=chunk.report.bad,
                )
                outputs.add(record)
                self._show(record)
                self._extend_checksums()
        self._extend_checksums()  # by what an earlier run wrote, where nothing was left to encode

    def _place(self, report: Report) -> dict[str, Location]:
        """Return where a chunk goes; end the run at what shall end it, of all chunks the first in order."""
        if report.bad and self.plan.on_error == "stop":
            (bad,) = number_lines(lambda: report.bad[:1])
            raise PreprocessError(f"{bad}; --on-error skip or quarantine skips such documents")
        return self.outputs.place(report.sizes)

    def _extend_checksums(self) -> None:
        for path, end in self.outputs.newly_final():
            self.checksums.extend(path, end)

    def _fall_back(self, error: InexactEncoderError) -> None:
        name, reference = self.choice.encoder.name, self.choice.reference
        assert reference
        if self.plan.encoder:
            raise _NothingToKeepError(f"--encoder {name} is not exact: {error}; drop it") from error
        if not self.plan.rereadable:
            raise _NothingToKeepError(
                f"the encoder {name} is not exact: {error}; run again with --encoder {reference.name}"
            ) from error
        self.progress.note(f"the encoder {name} is not exact, starting again with {reference.name}: {error}")
        self.choice = ChosenEncoder(reference, None)
        self.encoder = self._chunk_encoder()
        self.progress.reset()
        self.checksums = RunningChecksums()
        self.outputs.restart(reference.name)

    def _check_tokens(self) -> None:
        """Refuse what Megatron cannot map; a shard may be empty, as long as not all are."""
        if self.plan.shard[1] > 1:
            return
        total = self.outputs.records.total()
        tokens = Counter[str]()
        for (key, _), size in self.outputs.datasets().items():
            tokens[key] += size.tokens
        for key in self.plan.keys:
            if not total.skipped and not (total.sizes and total.sizes[key].documents):
                names = " ".join(file.path for file in self.plan.inputs)
                raise _NothingToKeepError(f"no documents: {names} is empty")
            if not tokens[key]:
                skipped = " or was skipped" if total.skipped else ""
                raise _NothingToKeepError(
                    f"{self.plan.dataset_prefix(key)}: every document is empty{skipped}, so there are no "
                    f"tokens to write"
                )

    def _summary(self, files: list[Path]) -> Summary:
        total = self.outputs.records.total()
        return Summary(
            documents=total.sizes[self.plan.keys[0]].documents if total.sizes else 0,
            tokens=sum(size.tokens for size in total.sizes.values()),
            bytes=total.bytes,
            empty=sum(total.empty.values()),
            skipped=total.skipped,
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
            errors=sum(record.skipped.values()),
            new=new,
        )
