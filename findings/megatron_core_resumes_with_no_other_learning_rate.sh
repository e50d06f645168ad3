#!/usr/bin/env bash
# megatron-core 0.19: an optimizer's groups of parameters are known by their learning rates, among others, when its state
# is loaded. A run resumed with another --lr or --min-lr finds none, and ends, although --override-opt-param-scheduler
# was made for that, and the scheduler itself, which is loaded afterwards, would take the new rate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.11.0 megatron-core==0.19.2
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2>"$folder/error.log" || { cat "$folder/error.log"; exit 1; }
from importlib.metadata import version

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def group(rate):
    return {"params": [torch.nn.Parameter(torch.ones(2))], "max_lr": rate, "min_lr": 0.0, "wd_mult": 1.0, "lr_mult": 1.0}


def scheduler(rate):
    return OptimizerParamScheduler(
        torch.optim.AdamW([group(rate)]),
        init_lr=0.0, max_lr=rate, min_lr=0.0, lr_warmup_steps=1, lr_decay_steps=100, lr_decay_style="cosine",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
    )


print("megatron-core", version("megatron-core"))
print("groups are known by", ", ".join(param_group_identifier_keys))
resumed = scheduler(1e-2)
resumed.load_state_dict(scheduler(1e-3).state_dict())
print("the scheduler, told to override, takes the new rate:", resumed.max_lr)
assert resumed.max_lr == 1e-2
try:
    MegatronOptimizer._filter_and_reorder_param_groups([group(1e-2)], [group(1e-3)])
except ValueError as error:
    print("the optimizer, before it:", str(error).splitlines()[0])
else:
    raise SystemExit("the behaviour changed: the group is found")
PYTHON
