"""What goes to Weights & Biases: all that imports wandb."""
