"""What the scripts beside this have in common: jobs from a file, a line in answer to each.

Each script runs in a Python that has a runtime, and imports nothing of this project unless it says so. A job
has ``folder``, an exported model; ``tokens``, whose logits are wanted; ``texts``, whose ids are wanted;
``prompts``, which ``greedy`` tokens each are to follow; ``work``, a folder for what a runtime makes of it;
``parts``, what is wanted of these. An answer has what each part returned, or the error in which it ended.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARK = "@@answer "
Job = dict[str, Any]


def answer(packages: tuple[str, ...], **parts: Callable[[Job], Any]) -> None:
    """Do the jobs of the file that is the first argument, each part that this runtime has."""
    versions = {name: version(name) for name in packages}
    for line in Path(sys.argv[1]).read_text().splitlines():
        job = json.loads(line)
        Path(job["work"]).mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"versions": versions}
        for name in [name for name in parts if name in job["parts"]]:
            try:
                found[name] = parts[name](job)
            except Exception as error:  # of any kind: it is what is to be told
                words = " ".join(str(error).split())
                found[f"{name}_error"] = f"{type(error).__name__}: {words}"[:700]
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{MARK}{json.dumps(found)}", flush=True)


def once(load: Callable[[Job], Any]) -> Callable[[Job], Any]:
    """Keep what was loaded for a job until the next is loaded."""
    kept: dict[str, Any] = {}

    @functools.wraps(load)
    def loaded(job: Job) -> Any:
        if job["folder"] not in kept:
            kept.clear()
            gc.collect()
            kept[job["folder"]] = load(job)
        return kept[job["folder"]]

    return loaded


def auto_tokenizer_ids(job: Job) -> list[list[int]]:
    """Return the ids of transformers' tokenizer, which many runtimes take."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    return [tokenizer(text).input_ids for text in job["texts"]]
