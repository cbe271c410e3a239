"""Whole models: throughput, memory, caches, where a step goes."""
