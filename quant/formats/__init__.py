"""Checkpoint formats: what their configs say, and their readers and writers."""
