"""What benchmarks/preprocess.py compares: its corpus, tokenizers, contestants and measurements."""
