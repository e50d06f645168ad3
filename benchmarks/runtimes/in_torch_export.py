"""torch.export, and ONNX made of it, in onnxruntime."""

import sys

import torch
from child import answer
from plain import Plain

SHAPES = ({1: torch.export.Dim.DYNAMIC},)


def exported(job):
    """Export, with the length of sequences left open."""
    example = torch.tensor(job["tokens"])[:, :16]
    with torch.no_grad():
        return torch.export.export(Plain(job["folder"]), (example,), dynamic_shapes=SHAPES)


def logits(job):
    """Return those of the exported program."""
    with torch.no_grad():
        # Its guards look for the size of an input that is None, with the shapes that it was exported for too.
        return exported(job).module(check_guards=False)(torch.tensor(job["tokens"])).tolist()


def first(error):
    """Return the error that others were raised from: the exporter's own say that one of its steps failed."""
    while error.__cause__:
        error = error.__cause__
    return error


def in_onnxruntime(job):
    """Return those of the same in onnxruntime."""
    import onnxruntime

    file = f"{job['work']}/model.onnx"
    example = torch.tensor(job["tokens"])[:, :16]
    try:
        torch.onnx.export(
            Plain(job["folder"]), (example,), file, dynamo=True, dynamic_shapes=SHAPES, verbose=False
        )
    except Exception as error:
        raise first(error) from error
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    return session.run(None, {name: torch.tensor(job["tokens"]).numpy()})[0].tolist()


if sys.argv[2:] == ["onnx"]:
    answer(("onnxruntime", "onnx", "onnxscript", "torch", "transformers"), logits=in_onnxruntime)
else:
    answer(("torch", "transformers"), logits=logits)
