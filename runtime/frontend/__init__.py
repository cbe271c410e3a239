"""What programs call: `LLM`, `AsyncLLM`, and text made of tokens."""
