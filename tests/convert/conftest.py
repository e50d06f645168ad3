import functools
import json
import shutil
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.convert.import_model import ImportOptions, import_model
from megatron_periln.convert.tokens import auto_tokenizer
from megatron_periln.errors import UsageError
from tests.convert import checkpoints
from tests.convert.cases import CASES
from tests.convert.forked_readers import ForkedReaders
from tests.convert.published import quietly
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


@pytest.fixture
def refused(tmp_path):
    """Return the one line with which a model is refused once its files were changed, with --no-verify too.

    ``SOURCE`` stands in it for the folder.
    """

    def of(model, change=lambda tensors: None, without=(), **settings):
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(model, source)
        config = json.loads((source / "config.json").read_text()) | settings
        kept = {key: value for key, value in config.items() if key not in without}
        (source / "config.json").write_text(json.dumps(kept))
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, source / "model.safetensors")
        with pytest.raises(UsageError) as found:
            import_model(source, tmp_path / "checkpoint", ImportOptions(verify=False), say=quietly)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        line = str(found.value)
        assert "\n" not in line
        return line.replace(f"{source}", "SOURCE")

    return of
