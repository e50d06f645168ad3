#!/usr/bin/env bash
# tokenizers 0.23.3: the normalizer `Precompiled`, which holds the normalization rule of a SentencePiece model (nmt_nfkc,
# SentencePiece's default: T5, ALBERT, XLM-R, mBART), looks a user-perceived character of up to 5 bytes up as a whole, takes
# the shortest rule that its beginning has, and drops what follows: combining marks are gone. SentencePiece takes the
# longest rule at each place and goes on behind it, so that no mark is lost. Longer ones are looked up a code point at a
# time, so that nothing is composed: Hangul from its letters, Japanese with marks of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
"$folder/env/bin/python" - <<'PYTHON'
import io
from importlib.metadata import version

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers.normalizers import Precompiled

print(*(f"{name} {version(name)}" for name in ("tokenizers", "sentencepiece")))
content = io.BytesIO()
lines = [f"the {number} quick brown foxes jump over {number * 7} lazy dogs" for number in range(100)]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=content, vocab_size=40, hard_vocab_limit=False, minloglevel=2
)
model = sentencepiece_model_pb2.ModelProto.FromString(content.getvalue())
processor = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
rule = model.normalizer_spec
print("rule", rule.name)
precompiled = Precompiled(rule.precompiled_charsmap)

texts = {
    "Vietnamese, decomposed": ("e\u0323\u0302", "\u1eb9", "\u1ec7"),
    "a letter with two marks": ("a\u0308\u0301", "\u00e4", "\u00e4\u0301"),
    "a ligature with a mark": ("\ufb01\u0301", "fi", "fi\u0301"),
    "Hangul from its letters": ("\u1112\u1161\u11ab", "\u1112\u1161\u11ab", "\ud55c"),
    "Hiragana with its mark": ("\u304b\u3099", "\u304b\u3099", "\u304c"),
}
for name, (text, *expected) in texts.items():
    found = [precompiled.normalize_str(text), processor.normalize(text).strip("\u2581")]
    print(f"{name}: {text!a}: tokenizers {found[0]!a}, SentencePiece {found[1]!a}")
    assert found == expected, "the behaviour changed"
PYTHON
