"""Declared studies: many training runs of one comparison, and one table of what came of them."""
