"""Flags that other Megatrons have, and what became of them."""
