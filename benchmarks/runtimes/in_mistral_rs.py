"""mistral.rs: greedy text, as it gives no logits of a prompt, and its tokenizer's ids."""

import os

from child import answer, once

os.environ["HF_HUB_OFFLINE"] = "1"
import mistralrs


@once
def model(job):
    """Load it."""
    which = mistralrs.Which.Plain(model_id=job["folder"], dtype=mistralrs.ModelDType.F32)
    return mistralrs.Runner(which=which, no_paged_attn=True)


def continued_texts(job):
    """Return what it writes."""
    settings = {"model": "default", "max_tokens": job["greedy"], "temperature": 0.0, "top_k": 1}
    requests = [mistralrs.CompletionRequest(prompt=prompt, **settings) for prompt in job["prompts"]]
    return [model(job).send_completion_request(each).choices[0].text for each in requests]


def ids(job):
    """Return those of its tokenizer."""
    return [model(job).tokenize_text(text, True, None) for text in job["texts"]]


answer(("mistralrs",), continued_texts=continued_texts, ids=ids)
