"""Small tokenizers of the kinds that Megatron trains with, and the texts that they are compared on."""

import base64
import inspect
import io
import json
import textwrap
from argparse import ArgumentParser

from megatron_periln.data.tokenizers.megatron_tokenizer import add_tokenizer_args
from megatron_periln.data.tokenizers.probes import probe_texts, vocabulary_texts
from tests.data.vocabularies import byte_level_files

LINES = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
SOURCE = inspect.getsource(textwrap)
SPLITS_DIGITS = r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"
END = "<|endoftext|>"


def parse(*flags):
    return add_tokenizer_args(ArgumentParser()).parse_args([str(flag) for flag in flags])


def sentencepiece_model(text=LINES, **options):
    """Train a SentencePiece model; return what its file holds."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 600, "model_type": "bpe", "byte_fallback": True, **IDENTITY, **options},
    )
    return model.getvalue()


IDENTITY = {"normalization_rule_name": "identity"}
QUICKSTART = {"remove_extra_whitespaces": False, "user_defined_symbols": ["\n"]}
"""The options of examples/quickstart."""


def with_pieces(model, *pieces, kind=1, score=0.0):
    """Return a SentencePiece model with pieces appended, as tools that add tokens do."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    for text in pieces:
        content.pieces.add(piece=text, score=score, type=kind)
    return content.SerializeToString()


def with_kind(model, text, kind):
    """Return a SentencePiece model in which a piece is of another kind."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    next(piece for piece in content.pieces if piece.piece == text).type = kind
    return content.SerializeToString()


def hugging_face(folder, kind="GPT2Tokenizer", pattern=SPLITS_DIGITS, **settings):
    """Save a byte-level BPE that splits digits, for the class of the name; return Megatron's flags."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*LINES, *(str(number * 7919) for number in range(2000))],
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=[END, "<|user|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": kind, "eos_token": END, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return parse("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)


def pieces(folder, **options):
    """Save a SentencePiece model with the quickstart's options; return Megatron's flags."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**{**QUICKSTART, **options}))
    return parse(
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"
    )


def tiktoken(folder, pattern="v2"):
    """Save a vocabulary of Megatron's tiktoken kind; return Megatron's flags."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel

    hugging_face(folder / "words")
    tokenizer = Tokenizer.from_file(str(folder / "words/tokenizer.json"))
    numbered = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number > 1)
    # Merges that end in the middle of a character are left out; what they make too.
    merged = [ByteLevel().decode([token]) for _, token in numbered if len(token) > 1]
    words = [bytes([byte]) for byte in range(256)] + [
        word.encode() for word in merged if "\ufffd" not in word
    ]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": ""}
        for rank, word in enumerate(dict.fromkeys(words))
    ]
    (folder / "tiktoken.json").write_text(json.dumps(entries))
    return parse(
        *("--tokenizer-type", "TikTokenizer", "--tokenizer-model", folder / "tiktoken.json"),
        *("--tiktoken-num-special-tokens", 20, "--vocab-size", len(entries) + 20),
        *("--tiktoken-pattern", pattern),
    )


def vocabulary_files(folder):
    """Save vocab.json and merges.txt; return Megatron's flags."""
    folder.mkdir(parents=True)
    vocabulary, merges = byte_level_files(folder, 500)
    kind = ("--tokenizer-type", "GPT2BPETokenizer")
    return parse(*kind, "--vocab-file", vocabulary, "--merge-file", merges)


KINDS = {
    "HuggingFaceTokenizer": hugging_face,
    "SentencePieceTokenizer": pieces,
    "TikTokenizer": tiktoken,
    "GPT2BPETokenizer": vocabulary_files,
}


def texts(special, vocabulary, mixtures=1500):
    """Return texts of all kinds."""
    joined = ["\n".join(LINES[at : at + 40]) for at in range(0, len(LINES), 40)]
    beside = [
        text
        for token in special
        for text in (f"{token}</s>", f"{token}<0x41>", f"<unk>{token}", f"a{token}", f"{token} {token}a")
    ]
    mixed = probe_texts(special, vocabulary, mixtures)
    return [*mixed, *vocabulary_texts(vocabulary), *LINES, *joined, SOURCE, *beside]
