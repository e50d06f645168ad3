"""Training of tokenizers that Megatron loads."""
