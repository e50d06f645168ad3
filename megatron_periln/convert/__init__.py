"""Models of Megatron to and from transformers, with a parity check of their logits.

``export`` and ``import_model`` convert; both read top to bottom. ``targets`` says which architectures of
transformers there are, ``architecture`` what a model computes, ``unsupported`` what of it a target lacks, and
``weights`` and ``hf_config`` how its parameters and its configuration stand on either side.
"""
