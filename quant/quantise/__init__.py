"""From dense weights to 4-bit checkpoints."""
