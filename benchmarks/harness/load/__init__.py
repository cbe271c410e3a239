"""Requests that arrive over time: workloads, their client, `vkv bench serve`."""
