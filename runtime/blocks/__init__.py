"""Checkpoints cut into blocks: what several models have in common is stored, and mapped, once."""
