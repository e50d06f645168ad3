"""What a run will take, before it is launched: memory, communication, time."""
