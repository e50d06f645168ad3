"""What is changed in Megatron and torch so that a process starts sooner. No value that trains changes."""
