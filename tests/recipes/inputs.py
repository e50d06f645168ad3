"""What the recipes' paths stand for: a corpus and tokenizers, made here."""

import json
import sysconfig
from pathlib import Path

import numpy as np


def make_inputs(folder):
    """Make ``data/`` in ``folder``: a corpus of short documents, tokenizers of three kinds."""
    data = folder / "data"
    data.mkdir(parents=True)
    texts = _documents()
    _train_byte_pairs(data, texts)
    _train_sentence_pieces(data, texts)
    _write_corpus(data, texts)


def _documents():
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        texts += [text for text in path.read_text(errors="replace").split("\n\n") if len(text) > 20]
    return texts[:3000]


def _train_byte_pairs(data, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:300], trainer)
    tokenizer.model.save(str(data))
    (data / "hf").mkdir()
    tokenizer.save(str(data / "hf" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (data / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))


def _train_sentence_pieces(data, texts):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(text.split()) for text in texts[:300]),
        model_prefix=str(data / "tokenizer"),
        vocab_size=400,
        character_coverage=0.99,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )


def _write_corpus(data, texts):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = data / "corpus_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in texts:
        tokens = [byte % 250 + 1 for byte in text.encode()[:200]] + [0]
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
