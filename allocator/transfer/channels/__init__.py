"""Ways for the tokens of a transfer to get from the cache of one process to that of another."""

from .copying import CopyChannel
from .job import Channel, ChannelJob
from .pages import PageChannel

__all__ = ["Channel", "ChannelJob", "CopyChannel", "PageChannel"]
