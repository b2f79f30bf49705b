"""What weighting does: commands that read the weights of losses and of trained checkpoints."""
