"""What a step costs beside memory: operations, communication, waiting, and the checkpoint."""
