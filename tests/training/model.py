"""The model that jobs train, in Megatron's flags."""

MODEL = """
    --num-layers 2 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --save-interval 1000 --train-iters 6
"""
