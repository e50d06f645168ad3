"""What a process imports before its first step, with and without the changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STOCK = """
import json, sys, torch
parameter = torch.nn.Parameter(torch.ones(1))
parameter.grad = torch.ones(1)
optimizer = torch.optim.AdamW([parameter], lr=0.1)
optimizer.step()
dynamo = "torch._dynamo" in sys.modules
from megatron_periln import cpu  # where Megatron compiles nothing while it is imported
cpu.activate()
from megatron.core.tokenizers.text.libraries import null_tokenizer
print(json.dumps([dynamo, "transformers" in sys.modules, parameter.item()]))
"""

OURS = """
import json, sys, torch
from megatron_periln import cpu
cpu.activate()
from megatron_periln.patches import fixes
fixes.apply()
parameter = torch.nn.Parameter(torch.ones(1))
parameter.grad = torch.ones(1)
optimizer = torch.optim.AdamW([parameter], lr=0.1)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
before = ["torch._dynamo" in sys.modules, "transformers" in sys.modules, parameter.item()]
from megatron.core.tokenizers.text.libraries import chat_template, huggingface_tokenizer, sft_tokenizer
late = huggingface_tokenizer.AutoTokenizer
after = [late.from_pretrained.__qualname__, sft_tokenizer.transformers.__name__]
import transformers
same = late.from_pretrained == transformers.AutoTokenizer.from_pretrained
rendered = chat_template._compile_jinja_template("{{ 1 + 1 }}").render()
for name in ("absent", "__absent__"):
    try:
        getattr(sft_tokenizer.transformers, name)
    except AttributeError as error:
        after.append(str(error))
print(json.dumps([before, after, same, rendered]))
"""


def said(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stock():
    return said(STOCK)


def test_upstream_still_imports_dynamo_with_the_first_optimizer(stock):
    assert stock[0]


def test_upstream_still_imports_transformers_for_any_tokenizer(stock):
    assert stock[1]


def test_neither_is_imported_and_what_is_late_is_what_it_was(stock):
    before, after, same, rendered = said(OURS)
    assert before == [False, False, stock[2]]
    assert after[:2] == ["AutoTokenizer.from_pretrained", "transformers"]
    assert same
    assert rendered == "2"
    assert "has no attribute absent" in after[2].replace("'", "")
    assert "has no attribute __absent__" in after[3].replace("'", "")
