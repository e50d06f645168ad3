"""Models of Megatron to and from transformers, checked by their logits.

``targets`` says which architectures there are; ``export`` and ``import_model`` convert.
"""
