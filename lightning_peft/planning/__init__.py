"""What memory a run takes, found by running a step of it on tensors without values."""
