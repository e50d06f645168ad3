"""lm-evaluation-harness finds in an exported model the likelihoods of Megatron's."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from megatron_periln.convert.export import ExportOptions, export
from megatron_periln.evaluation.loss import mean_loss
from megatron_periln.evaluation.tasks import other_scores, run_tasks

pytest.importorskip("lm_eval", reason="make test-harness installs it")

REQUESTS = [
    ("Norms on both sides of", " every sublayer"),
    ("Norms on both sides of", " nothing"),
    ("a = [1, 2, 3]; print(", "a[0])"),
]
TEXT = "Gradients of all layers stay about alike."


@pytest.fixture(scope="module")
def folder(saved, byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    options = ExportOptions(tokenizer=byte_tokenizer, verify=False)
    export(saved("peri").folder, folder, options, say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def harness(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def likelihood(saved, name, tokenizer, context, continuation):
    """Return the continuation's likelihood in Megatron's model, and whether it is the most probable."""
    prompt, tokens = (tokenizer(text).input_ids for text in (context, context + continuation))
    assert tokens[: len(prompt)] == prompt and len(tokens) - len(prompt) >= 4
    logits = saved(name).logits(torch.tensor([tokens[:-1]]))[0, len(prompt) - 1 :]
    targets = torch.tensor(tokens[len(prompt) :])
    found = logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return found, torch.equal(logits.argmax(-1), targets)


def test_likelihoods_of_continuations(saved, tokenizer, harness):
    found = harness.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    for request, (value, greedy) in zip(REQUESTS, found, strict=True):
        expected, most_probable = likelihood(saved, "peri", tokenizer, *request)
        assert value == pytest.approx(expected, abs=3e-5)
        assert greedy is most_probable
        other, _ = likelihood(saved, "peri, half rotary", tokenizer, *request)
        assert abs(value - other) > 1e-2


def test_likelihood_of_a_text_is_the_loss(saved, tokenizer, harness):
    (found,) = harness.loglikelihood_rolling(instances("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)
    tokens = torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT).input_ids])
    loss = mean_loss(saved("peri").logits, iter([tokens]))
    assert loss.tokens == len(tokens) - 1
    assert -found / loss.tokens == pytest.approx(loss.nats, abs=2e-6)


OURS = """task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def test_a_task_of_a_local_folder_is_the_loss(saved, folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "ours.jsonl"
    data.write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "ours.yaml").write_text(OURS.format(data=data))
    results = run_tasks(folder, [str(tmp_path)], device="cpu", batch_size=1)
    found = other_scores(results)["ours"]["byte_perplexity"]
    loss = mean_loss(
        saved("peri").logits, iter([torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT).input_ids])])
    )
    expected = math.exp(loss.nats * loss.tokens / len(TEXT.encode()))
    assert found == pytest.approx(expected, rel=1e-5)
    other = mean_loss(
        saved("peri, half rotary").logits,
        iter([torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT).input_ids])]),
    )
    assert abs(found / math.exp(other.nats * other.tokens / len(TEXT.encode())) - 1) > 1e-3
