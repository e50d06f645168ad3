"""onnxruntime-genai: its own model builder, and its own tokenizer."""

import subprocess
import sys

import onnxruntime_genai as og
from child import answer, once


@once
def model(job):
    """Build it."""
    built = f"{job['work']}/genai"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", job["folder"]]
    command += ["-o", built, "-p", "fp32", "-e", "cpu", "-c", job["work"]]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no word"])[-1])
    return og.Model(built)


def logits(job):
    """Return those of the whole sequences, each by itself."""
    rows = []
    for row in job["tokens"]:
        settings = og.GeneratorParams(model(job))
        settings.set_search_options(max_length=256, batch_size=1)
        generator = og.Generator(model(job), settings)
        generator.append_tokens([row])
        rows.append(generator.get_output("logits")[0].tolist())
    return rows


def ids(job):
    """Return those of its tokenizer, which reads tokenizer.json and tokenizer_config.json."""
    tokenizer = og.Tokenizer(model(job))
    return [list(map(int, tokenizer.encode(text))) for text in job["texts"]]


answer(("onnxruntime-genai", "onnxruntime", "transformers"), logits=logits, ids=ids)
