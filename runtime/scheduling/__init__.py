"""Which tokens go through the model next."""
