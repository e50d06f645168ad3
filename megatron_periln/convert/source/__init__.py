"""What a model to be imported says of itself, and whether its files agree."""
