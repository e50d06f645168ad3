"""Which tokenizer training takes, as Megatron's pretrain_gpt.py does, or the one line that none is given."""

import pytest

from megatron_periln.errors import UsageError
from tests.data.vocabularies import byte_level_files
from tests.training import flag_trials as trials

NONE = "~--tokenizer-type ~--vocab-size"

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def test_no_tokenizer_is_one_line():
    with pytest.raises(UsageError, match=r"--tokenizer-type is missing: .* --vocab-file and --merge-file"):
        trials.parse(NONE)


def test_the_two_files_are_enough(tmp_path):
    vocabulary, merges = byte_level_files(tmp_path, 300)
    args, _ = trials.parse(f"{NONE} --vocab-file {vocabulary} --merge-file {merges}")
    assert args.tokenizer_type == "GPT2BPETokenizer"
