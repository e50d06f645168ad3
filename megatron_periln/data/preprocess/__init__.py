"""Corpora to indexed datasets: many worker processes, Megatron's bytes, and a run that can be resumed.

``driver`` is a run, from top to bottom, and ``plan`` says what it shall do. ``encode`` turns a chunk of the
input into tokens (``sentences`` splits its texts), ``workers`` are the processes that do so and write, and
``checker`` is one that has a sample of each chunk encoded again by the tokenizer's library; ``processes``
starts and ends both kinds. ``journal`` notes each chunk and finds its place again. ``partial_outputs`` is
the folder of a run that has not ended, and ``finalize`` its end; ``checksums`` and ``progress`` go beside it.
"""
