"""An export's tokenizer: files that give, in transformers, the ids that the model was trained with."""
