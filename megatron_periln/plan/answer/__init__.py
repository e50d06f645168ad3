"""What a plan says: whether it fits, what would make it fit, and how that is shown."""
