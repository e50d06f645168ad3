"""From files to documents.

``inputs`` finds the files that ``--input`` names, ``tasks`` cuts them for workers, ``together`` joins what is
small, ``sources`` and ``parquet`` read what is cut (``opening`` opens it, ``compression`` decompresses it),
and ``documents`` finds the texts, or what is wrong.
"""
