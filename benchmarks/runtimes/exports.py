"""Small trained models of every target with a tokenizer of every kind, exported; what Megatron makes of them.

Tokenizers and data are made of the sources of Python's standard library; each model trains for 40 steps on
the CPU. Each job is forked from one process that has imported everything once. What is there is kept.

    python benchmarks/runtimes/exports.py WORK [--targets ...] [--kinds ...]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"

from megatron_periln import cpu
from megatron_periln.command_line import prepare_for_megatron

prepare_for_megatron()
cpu.activate(hide_gpu=True)

import torch  # noqa: E402
from table import KINDS, TOKENIZED  # noqa: E402

import megatron_periln.training.run  # noqa: E402, F401
from megatron_periln import pretrain  # noqa: E402
from megatron_periln.checkpoints.reader import Checkpoint  # noqa: E402
from megatron_periln.convert.export import ExportOptions, export  # noqa: E402
from megatron_periln.convert.logits import LogitsModel, checkpoint_model  # noqa: E402
from megatron_periln.convert.tokens.texts import FEATURES  # noqa: E402
from megatron_periln.convert.tokens.training_tokenizer import find_tokenizer  # noqa: E402
from megatron_periln.data.tokenizers.probes import probe_texts  # noqa: E402
from megatron_periln.tools import preprocess_data, train_tokenizer  # noqa: E402

VOCABULARY = 2000
DOCUMENTS = 120
TOKENS, MIXTURES, PROMPTS, GREEDY = 48, 600, 16, 6
MODEL = """--num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --normalization RMSNorm --swiglu --norm-epsilon 1e-5
    --position-embedding-type rope --untie-embeddings-and-output-weights
    --seq-length 128 --max-position-embeddings 512 --attention-dropout 0 --hidden-dropout 0
    --device cpu --train-iters 40 --micro-batch-size 4 --global-batch-size 4 --lr 4e-3 --min-lr 4e-4
    --lr-warmup-iters 5 --clip-grad 1.0 --split 100,0,0 --eval-iters 0 --log-interval 10 --save-interval 20
    --num-workers 0 --seed 7 --make-vocab-size-divisible-by 128"""
WITHOUT_BIASES = " --disable-bias-linear"
EXPERTS = WITHOUT_BIASES + " --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64"
SHARED = " --moe-shared-expert-intermediate-size 64"
SIGMOID = EXPERTS + " --moe-router-score-function sigmoid"
WINDOWS = " --window-size 15,0 --window-attn-skip-freq 4"
TARGETS = {
    "glm4": "--norm-placement peri --add-qkv-bias" + WITHOUT_BIASES,
    "hyperclovax": "--norm-placement peri",
    "lfm3": "--norm-placement peri --qk-layernorm" + WITHOUT_BIASES,
    "llama": "--norm-placement pre" + WITHOUT_BIASES,
    "qwen3": "--norm-placement pre --qk-layernorm" + WITHOUT_BIASES,
    "exaone4": "--norm-placement output --qk-layernorm" + WITHOUT_BIASES,
    "olmo2": "--norm-placement output --qk-layernorm --whole-qk-norm" + WITHOUT_BIASES,
    "minimax": "--norm-placement post --embedding-norm" + WITHOUT_BIASES,
    "olmo3": "--norm-placement output --qk-layernorm --whole-qk-norm" + WINDOWS + WITHOUT_BIASES,
    "afmoe": "--norm-placement peri --qk-layernorm --attention-output-gate --no-rope-freq [0,0,0,1]"
    " --moe-layer-freq [0,1,1,1] --moe-router-enable-expert-bias" + WINDOWS + SIGMOID + SHARED,
    "kolibri1": "--norm-placement peri --qk-layernorm --no-rope-freq [0,0,0,1]" + WINDOWS + SIGMOID,
    "mixtral": "--norm-placement pre" + EXPERTS,
    "qwen3_moe": "--norm-placement pre --qk-layernorm" + EXPERTS,
    "qwen2_moe": "--norm-placement pre --add-qkv-bias --moe-router-pre-softmax --moe-shared-expert-gate"
    + EXPERTS
    + SHARED,
    "glm4_moe": "--norm-placement pre --add-qkv-bias --moe-layer-freq [0,1,1,1] --rotary-percent 0.5"
    " --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5" + SIGMOID + SHARED,
}
"""What makes a model one of each target."""


def forked(what: Callable[[], object], log: Path) -> None:
    """Do something in a fork of this process, with its output in a log, of whose end an error tells."""
    sys.stdout.flush()
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("\n".join([f"failed: {log}", *log.read_text().splitlines()[-5:]]))
        return
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = int(what() or 0)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pretrained(flags: list[str]) -> None:
    """Train, as the only rank."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["pretrain", *flags]
    pretrain.main()


def make(work: Path, target: str, kind: str) -> None:
    """Make a model, its export and its reference, unless they are there."""
    place = work / "models" / kind / target
    checkpoints, model, reference = place / "checkpoints", place / "export", place / "reference.json"
    if reference.exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_flags(work, kind)
    data = dataset(work, kind, tokenizer)
    if not (checkpoints / "latest_checkpointed_iteration.txt").exists():
        flags = [*MODEL.split(), *TARGETS[target].split(), *tokenizer, "--data-path", str(data)]
        flags += ["--save", str(checkpoints), "--data-cache-path", str(work / "cache")]
        forked(lambda: pretrained(flags), place / "train.log")
    if not model.exists():
        forked(lambda: export(checkpoints, model, ExportOptions(target=target)), place / "export.log")
    forked(lambda: write_reference(checkpoints, model, reference), place / "reference.log")
    print(f"made {model}", flush=True)


def write_reference(checkpoints: Path, model: Path, output: Path) -> None:
    """Write Megatron's logits of tokens, and training's ids of texts."""
    training = find_tokenizer(Checkpoint(checkpoints, None).args, None).training
    own = training.token_texts()
    generator = torch.Generator().manual_seed(20250)
    tokens = torch.randint(len(own), (2, TOKENS), generator=generator)
    special = training.parts.special_tokens
    features = [text for texts in FEATURES.values() for text in texts]
    texts = [*features, *probe_texts(special, training.parts.vocabulary or own, MIXTURES), *own[::4]]
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    with checkpoint_model(checkpoints) as reference:
        logits = reference.logits(tokens)[..., :vocab_size]
        prompts = beginnings(output.parents[3])
        continuations = [continued(reference, ids) for ids in training.encode(prompts)]
    content = {
        "prompts": prompts,
        "continuations": continuations,
        "tokens": tokens.tolist(),
        "logits": logits.tolist(),
        "texts": texts,
        "ids": training.encode(texts),
        "special": special,
    }
    output.write_text(json.dumps(content))


def continued(model: LogitsModel, ids: list[int]) -> list[int]:
    """Return the most probable tokens that follow, one after the other."""
    tokens = torch.tensor([ids])
    for _ in range(GREEDY):
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(ids) :].tolist()


def beginnings(work: Path) -> list[str]:
    """Return beginnings of documents, of several lengths."""
    lines = text(work).read_text().splitlines()[:PROMPTS]
    return [json.loads(line)["text"][: 24 + 17 * number] for number, line in enumerate(lines)]


def dataset(work: Path, kind: str, tokenizer: list[str]) -> Path:
    """Make the indexed dataset of a tokenizer, and return its prefix."""
    prefix = work / "data" / kind
    if not Path(f"{prefix}_text_document.idx").exists():
        arguments = ["--input", str(text(work)), "--output-prefix", str(prefix), "--append-eod", *tokenizer]
        forked(lambda: preprocess_data.main(arguments), work / f"{kind}.log")
    return Path(f"{prefix}_text_document")


def text(work: Path) -> Path:
    """Gather the text, a document a file, and return where it is."""
    path = work / "data" / "text.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:DOCUMENTS]
        lines = [json.dumps({"text": source.read_text(errors="replace")}) for source in sources]
        path.write_text("".join(f"{line}\n" for line in lines))
    return path


def tokenizer_flags(work: Path, kind: str) -> list[str]:
    """Train a tokenizer, and return Megatron's flags for it."""
    folder = work / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "SentencePieceTokenizer":
        model = trained(work, kind, folder / "pieces.model")
        return ["--tokenizer-type", kind, "--tokenizer-model", str(model)]
    if kind == "HuggingFaceTokenizer":
        return ["--tokenizer-type", kind, "--tokenizer-model", str(trained(work, kind, folder / "llama3"))]
    if kind == "GPT2BPETokenizer":
        written = trained(work, "HuggingFaceTokenizer", folder / "gpt2", "--split", "gpt2")
        model = json.loads((written / "tokenizer.json").read_text())["model"]
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs))
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        files = ["--vocab-file", str(folder / "vocab.json"), "--merge-file", str(folder / "merges.txt")]
        return ["--tokenizer-type", kind, *files]
    written = trained(work, "HuggingFaceTokenizer", folder / "llama3")
    entries = tiktoken_entries(json.loads((written / "tokenizer.json").read_text())["model"]["vocab"])
    (folder / "tiktoken.json").write_text(json.dumps(entries))
    return [
        *("--tokenizer-type", kind, "--tokenizer-model", str(folder / "tiktoken.json")),
        *("--tiktoken-pattern", "v2", "--tiktoken-num-special-tokens", "20"),
        *("--vocab-size", str(len(entries) + 20)),
    ]


def trained(work: Path, kind: str, output: Path, *options: str) -> Path:
    """Train a tokenizer with tools/train_tokenizer.py, unless it is there; return its file or folder."""
    if not output.exists():
        arguments = ["--input", text(work), "--tokenizer-type", kind, "--vocab-size", VOCABULARY]
        arguments += ["--output", output, *options]
        forked(lambda: train_tokenizer.main(list(map(str, arguments))), work / f"{output.name}.log")
    return output


def tiktoken_entries(vocabulary: dict[str, int]) -> list[dict[str, Any]]:
    """Return the whole characters of a byte-level vocabulary as Megatron's TikTokenizer reads them."""
    from tokenizers.decoders import ByteLevel

    words = [token for token in sorted(vocabulary, key=vocabulary.__getitem__) if len(token) > 1]
    plain = [ByteLevel().decode([word]) for word in words if not word.startswith("<")]
    merged = [word.encode() for word in plain if "\ufffd" not in word]
    every = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *merged])
    return [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": ""}
        for rank, word in enumerate(every)
    ]


def main() -> None:
    """Make them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    args = parser.parse_args()
    for kind in args.kinds:
        for target in args.targets:
            if kind == KINDS[0] or target in TOKENIZED:
                make(args.work.resolve(), target, kind)


if __name__ == "__main__":
    main()
