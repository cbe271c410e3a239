"""Kernels and driver calls alone."""
