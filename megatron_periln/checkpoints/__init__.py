"""Checkpoints that survive: who may write them, what is wrong with them, and which is the newest good one."""
