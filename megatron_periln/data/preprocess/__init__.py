"""Corpora to indexed datasets."""
