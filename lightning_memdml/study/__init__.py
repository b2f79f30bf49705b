"""What weighting does: the weights of losses and of trained checkpoints, and studies that compare arms."""
