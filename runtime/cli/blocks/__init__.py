"""`vkv blocks`: models in a zoo, stored once where they are equal."""
