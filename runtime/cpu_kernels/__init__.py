"""The CPU's kernels between attention calls, and where a model uses them."""
