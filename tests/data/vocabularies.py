"""Small tokenizers as files of a vocabulary and of merges, and what they mean without transformers."""

import inspect
import textwrap

from tokenizers import AddedToken, ByteLevelBPETokenizer

END = "<|endoftext|>"
TEXT = f"The quick brown fox\n\n  doesn't jump{END}over 123 lazy dogs, été 日本\t\x00 self.width  "


def byte_level_files(folder, size, *, tokenizer_json=False, end=True):
    """Train a byte-level BPE; return the paths of vocab.json and merges.txt in ``folder``."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        inspect.getsource(textwrap).splitlines(),
        vocab_size=size,
        special_tokens=[END] if end else [],
        show_progress=False,
    )
    tokenizer.save_model(str(folder))
    if tokenizer_json:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "vocab.json", folder / "merges.txt"


def reference_ids(vocabulary, merges, text=TEXT):
    """Return the ids of ``text``; GPT-2's end of a document is one token."""
    tokenizer = ByteLevelBPETokenizer(str(vocabulary), str(merges))
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer.encode(text).ids
