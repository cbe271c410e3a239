"""What a few tokens show of a model."""
