"""Sequences that leave one engine while they run, and go on in another."""
