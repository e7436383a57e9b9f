"""What a training step and an inference cost."""
