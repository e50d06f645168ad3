"""Write a tiktoken encoding as a Hugging Face tokenizer, which Megatron and all that reads exports know."""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import tiktoken

from megatron_periln.files import new_folder

END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write ``encoding`` to ``folder``, with the same ids; its end of text is Megatron's end of a document.

    Raises
    ------
    UsageError
        If ``folder`` holds something.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with new_folder(folder, flag="--output") as temporary:
        ranks = temporary / "ranks.tiktoken"
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in _ranks(encoding))
        ranks.write_text("".join(lines))
        converter = TikTokenConverter(
            vocab_file=str(ranks), pattern=encoding._pat_str, extra_special_tokens=_specials(encoding)
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token=END_OF_TEXT)
        tokenizer.save_pretrained(temporary)
        ranks.unlink()


def _ranks(encoding: tiktoken.Encoding) -> list[tuple[bytes, int]]:
    return sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])


def _specials(encoding: tiktoken.Encoding) -> list[str]:
    """Return the tokens after the ranks in the order of their ids, with one for each id that has none."""
    named = {encoding.encode_single_token(token): token for token in encoding.special_tokens_set}
    first = len(encoding._mergeable_ranks)
    return [named.get(number, f"<|unused_{number}|>") for number in range(first, encoding.n_vocab)]


def main() -> None:
    """Write the paper's tokenizer; tiktoken downloads it the first time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoding", default="cl100k_base", help="default: cl100k_base, the paper's")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    write_tokenizer(tiktoken.get_encoding(options.encoding), options.output)
    print(f"{options.encoding}: {options.output}")


if __name__ == "__main__":
    main()
