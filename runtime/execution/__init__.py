"""One batch through the model: inputs, recordings, sampled tokens."""
