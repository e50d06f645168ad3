"""Writes docs/flags.md from flags.json: ``python -m tests.training.flag_page``."""

import json
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"

EFFECTS = {
    "model": (
        "Changes the model",
        "What a model with given weights computes. `--use-checkpoint-args` takes these from a checkpoint, "
        "and one that was trained with another value is refused, unless `--allow-model-changes` is given.",
    ),
    "start": ("Changes the initial weights", "And nothing else."),
    "training": (
        "Changes training",
        "Data, optimizer, schedule, dropout, auxiliary losses: other weights come of it, that compute the "
        "same way.",
    ),
    "rounding": ("Changes rounding", "How exactly the same is computed."),
    "run": ("Changes only how it runs", "Layout, kernels, memory, logs, checkpoints."),
    "device": (
        "Needs a GPU, Transformer Engine or several processes",
        "And is refused without, or does nothing. Those with a star change the model.",
    ),
    "refused": (
        "Is refused",
        "By itself: because nothing reads it, because it belongs to another kind of training, or for want of "
        "another flag or of more processes, which the message names.",
    ),
    "idle": (
        "Changes nothing by itself, and is named when a run starts",
        "It belongs to another kind of training, or to a feature that another flag turns on.",
    ),
}


def write(flags):
    """Return the page."""
    lines = [
        "# What each flag does",
        "",
        f"All {len(flags)} flags of `--help-all`, by what they do to loss and gradients here. "
        "`tests/training/test_flags.py` runs",
        "each on small dense, mixture-of-experts, latent-attention and hybrid models; a flag that a new",
        "Megatron adds fails it until tests/training/flags.json says what it does. This page is written from",
        "that table by `python -m tests.training.flag_page`. Those that change the model are",
        "looked for in the specs of Transformer Engine's layers too, which needs no Transformer Engine.",
        "Those that change training, initial weights or rounding are tried in trainings of three steps, and",
        "those that change how a run goes must leave such a training as it is.",
    ]
    for effect, (title, text) in EFFECTS.items():
        entries = {flag: entry for flag, entry in sorted(flags.items()) if entry["effect"] == effect}
        lines += ["", f"## {title} ({len(entries)})", "", text, ""]
        if effect == "model":
            lines += ["| flag | tried | beside | on |", "|---|---|---|---|"]
            for flag, entry in entries.items():
                beside = " ".join(f"`{word}`" for word in [entry.get("with", "")] if word)
                lines.append(
                    f"| `{flag}` | `{entry['give']}` | {beside} | {entry['on'].replace(' ', ', ')} |"
                )
        else:
            names = [f"`{flag}`" + ("*" if entry.get("model") else "") for flag, entry in entries.items()]
            lines.append(", ".join(names) + ".")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
    PAGE.write_text(write(FLAGS))
