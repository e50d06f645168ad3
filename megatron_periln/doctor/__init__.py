"""Is this node fit to train? ``python -m megatron_periln.doctor``, before a job starts.

Every check gives rows of a table: ok, warning or failed, with what was measured. Nothing here
imports torch or Megatron but `probe`, in a process of its own, and `communication`, once there are
several ranks.
"""
