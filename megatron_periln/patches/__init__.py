"""Everything that is changed in Megatron or torch; docs/architecture.md has the table."""
