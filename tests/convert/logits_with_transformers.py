"""Run by another Python: the logits of models of transformers in fp32.

Arguments: a file of tokens (.npy), then pairs of a model's folder and the file for its logits.
"""

import gc
import sys

gc.disable()  # before the imports, of which it would take a quarter of the time

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

tokens = torch.from_numpy(np.load(sys.argv[1]))
for folder, output in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        np.save(output, model(tokens).logits.numpy())
