import functools
import json
from unittest import mock

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.tokens import auto_tokenizer
from tests.convert import checkpoints
from tests.convert.cases import CASES
from tests.convert.forked_readers import ForkedReaders
from tests.parallel.conftest import indexed_bytes, jobs  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def readers():
    """Tokenizers are read by forks of one process."""
    forked = ForkedReaders()
    with mock.patch.object(auto_tokenizer, "subprocess", forked):
        yield
    forked.close()


@pytest.fixture(scope="session")
def saved(single_process, tmp_path_factory):
    """Return the checkpoint of a case, saved when first asked for."""

    @functools.cache
    def of(name):
        return checkpoints.save(tmp_path_factory.mktemp("checkpoint"), CASES[name].flags)

    return of


@pytest.fixture(scope="session")
def exported(saved, tmp_path_factory):
    """Return the folder of a case's export, and the lines it said."""

    @functools.cache
    def of(name):
        said = []
        folder = tmp_path_factory.mktemp("exported") / "model"
        export(saved(name).folder, folder, ExportOptions(target=CASES[name].asked), say=said.append)
        return folder, said

    return of


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer, with the special tokens that llama.cpp's converter of GLM-4 asks for."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: checkpoints.VOCABULARY - 10]
    vocabulary = {byte: number for number, byte in enumerate(sorted({*alphabet, "Ċ", "Ġ"}))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"ab": len(vocabulary)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|user|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def config_of():
    """Return what the config.json in a folder holds."""
    return lambda folder: json.loads((folder / "config.json").read_text())
