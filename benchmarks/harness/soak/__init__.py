"""`vkv soak`: everything at once on a cluster, beside a process that knows what is right."""
