"""LoRA adapters: read as PEFT writes them, many in one batch, over whatever linears a model has."""
