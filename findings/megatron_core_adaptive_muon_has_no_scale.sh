#!/usr/bin/env bash
# megatron-core 0.19.2 with emerging-optimizers 0.3.0, which satisfies the only bound that megatron-core states (>= 0.2, in
# the message of its own check): --optimizer adaptive_muon is built, checked and logged, and ends at its first step. The
# package's AdaptiveMuon came to scale each update itself and reads a mode that its own constructor sets; megatron-core's
# subclass calls that of another parent. Plain Muon, of the same two packages, steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0 megatron-core==0.19.2 emerging-optimizers==0.3.0
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2>"$folder/error.log" || { cat "$folder/error.log"; exit 1; }
from importlib.metadata import version

import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelAdaptiveMuon, TensorParallelMuon

print("megatron-core", version("megatron-core"), "emerging-optimizers", version("emerging-optimizers"))
for optimizer in (TensorParallelMuon, TensorParallelAdaptiveMuon):
    weight = torch.nn.Parameter(torch.eye(4, 8))
    weight.grad = torch.ones(4, 8)
    try:
        optimizer([weight], lr=0.1).step()
        outcome = "steps"
    except AttributeError as error:
        outcome = f"AttributeError: {error}"
    print(f"{optimizer.__name__}: {outcome}")
    if (outcome == "steps") != (optimizer is TensorParallelMuon):
        raise SystemExit("the behaviour changed")
PYTHON
