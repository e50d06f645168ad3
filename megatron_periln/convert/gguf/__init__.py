"""An exported model as a GGUF file, in which llama.cpp gives the same token ids and logits."""
