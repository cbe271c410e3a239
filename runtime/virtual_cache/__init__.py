"""`VirtualCache`: virtual memory under `transformers`' own generate, without the engine."""
