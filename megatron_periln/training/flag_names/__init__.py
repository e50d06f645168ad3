"""Parsing that goes on after a flag it does not know; flags of other Megatrons, and what became of them."""
