"""What the training loop needs for each step: its time, and what all ranks agree on."""
