"""What is put on a model: weights beside its own, and what computes with them."""
