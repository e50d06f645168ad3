"""How good a model is: its loss on held-out text, and lm-evaluation-harness.

Takes models as functions from tokens to logits, so that those of Megatron and of transformers are
measured alike.
"""
