"""The tables of docs/export.md, from the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["KINDS", "MIXTURES", "TARGETS", "TOKENIZED", "tables"]

TARGETS = ("glm4", "hyperclovax", "lfm3", "llama", "qwen3", "exaone4", "olmo2", "minimax")
MIXTURES = ("olmo3", "afmoe", "kolibri1", "mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe")
"""Those with windows or experts, in a table of their own."""
TOKENIZED = ("glm4", "llama")
"""The targets with a tokenizer of every kind: AutoTokenizer of transformers 5 takes ``tokenizer.json`` as it
is for the one, and rebuilds it by its class for the other."""
KINDS = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "TikTokenizer")
_LONGEST = 190
Cell = dict[str, Any]
Cells = dict[str, dict[str, dict[str, Cell]]]


def tables(cells: Cells) -> str:
    """Return the tables of logits, why some have none, and the table of ids."""
    first = {
        name: {target: found[KINDS[0]] for target, found in cells[name].items() if KINDS[0] in found}
        for name in cells
    }
    logits = [line([named(name, found), *columns(found, TARGETS)]) for name, found in first.items()]
    mixed = {name: shown for name, found in first.items() if any(shown := columns(found, MIXTURES))}
    why = [f"- {name}, {text}" for name, found in first.items() for text in refusals(found)]
    ids = {name: [by_kind(cells[name], kind) for kind in KINDS] for name in cells}
    parts = [
        [head(["runtime", *TARGETS]), *logits],
        *(
            [[head(["runtime", *MIXTURES]), *(line([name, *shown]) for name, shown in mixed.items())]]
            if mixed
            else []
        ),
        why,
        [head(["runtime", *KINDS]), *(line([name, *found]) for name, found in ids.items() if any(found))],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def head(names: Sequence[str]) -> str:
    """Return the head of a table."""
    return line(names) + "\n" + line(["---"] * len(names))


def line(shown: Sequence[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(shown) + " |"


def named(name: str, found: dict[str, Cell]) -> str:
    """Return a runtime's name with the versions that it ran in."""
    versions = next((cell["versions"] for cell in found.values() if cell.get("versions")), {})
    shown = ", ".join(f"{package} {number.partition('+')[0]}" for package, number in versions.items())
    said = " ".join(word for cell in found.values() for word in cell.get("gguf", {}).get("said", []))
    if match := re.search(r"in llama\.cpp \(([^)]*)\)", said):
        shown = match[1]
    return f"{name} ({shown})" if shown else name


def columns(found: dict[str, Cell], targets: Sequence[str]) -> list[str]:
    """Return what was seen of each target."""
    return [of_logits(found[target]) if target in found else "" for target in targets]


def of_logits(cell: Cell) -> str:
    """Return the largest difference, or of how many greedy continuations all tokens are the same."""
    largest = cell.get("largest", cell.get("gguf", {}).get("largest"))
    apart = cell.get("lora", cell.get("merge", {})).get("apart", largest)
    if apart is not None:
        return "0" if apart == 0 else f"{apart:.0e}".replace("e-0", "e-")
    if "continuations" in cell:
        return f"same tokens {cell['continuations']['equal']} of {cell['continuations']['of']}"
    return "no"


def refusals(found: dict[str, Cell]) -> list[str]:
    """Return the words of errors, those of several targets together."""
    said: dict[str, list[str]] = {}
    for target, cell in found.items():
        if of_logits(cell) != "no":
            continue
        errors = [value for name, value in cell.items() if name == "ended" or name.endswith("_error")]
        said.setdefault(shortened(errors[0] if errors else "nothing", target), []).append(target)
    return [f"{', '.join(targets)}: {text}" for text, targets in said.items()]


def shortened(text: str, target: str) -> str:
    """Return an error in one line without paths, and without a target's own names."""
    text = re.sub(r"\x1b?\[\d+m", "", text)  # colours
    text = re.sub(r"(/[\w.+-]+){2,}/", "", text)
    text = re.sub(rf"`?\b{target}\w*`?", "this", text, flags=re.IGNORECASE)
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def by_kind(found: dict[str, dict[str, Cell]], kind: str) -> str:
    """Return how many texts have ids of training, with the worst of the targets."""
    cells = {target: found[target][kind] for target in (*TARGETS, *MIXTURES) if kind in found.get(target, {})}
    counted = {target: cell for target, cell in cells.items() if "texts" in cell}
    if not counted:
        return gguf_ids(cells)
    worst = max(counted.values(), key=lambda cell: cell["other_ids"])
    texts, other, special = (worst[name] for name in ("texts", "other_ids", "other_ids_with_special_tokens"))
    targets = of_targets(list(counted))
    if not other:
        return f"equal on {texts:,}{targets}"
    if other == special:
        return f"equal on {texts - other:,}; other on {other:,} with special tokens in the text{targets}"
    return f"other on {other:,} of {texts:,}{targets}"


def gguf_ids(cells: dict[str, Cell]) -> str:
    """Return the same of what tools/export_gguf.py said."""
    told = {
        target: said
        for target, cell in cells.items()
        for said in cell.get("gguf", {}).get("said", [])
        if said.startswith("Tokenizer")
    }
    first = next(iter(told.values()), "")
    if match := re.search(r"ids equal on ([\d,]+) texts, ([\d,]+) tokens", first):
        equal = sum(int(number.replace(",", "")) for number in match.groups())
        return f"equal on {equal:,}{of_targets(list(told))}"
    return "refused" if any("gguf_error" in cell for cell in cells.values()) else ""


def of_targets(names: Sequence[str]) -> str:
    """Return of which targets it is said."""
    return f", {' and '.join(names)}" if len(names) <= len(TOKENIZED) else f", {len(names)} targets"
