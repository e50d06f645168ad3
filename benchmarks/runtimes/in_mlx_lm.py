"""mlx-lm, on the CPU."""

import mlx.core as mx
import mlx_lm
from child import answer, auto_tokenizer_ids

mx.set_default_device(mx.cpu)


def logits(job):
    """Return those of the whole sequences."""
    model, _ = mlx_lm.load(job["folder"])
    model.set_dtype(mx.float32)
    return model(mx.array(job["tokens"])).tolist()


answer(("mlx-lm", "mlx-cpu", "transformers"), logits=logits, ids=auto_tokenizer_ids)
