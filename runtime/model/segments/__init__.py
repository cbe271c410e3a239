"""Attention of requests some of whose tokens lie elsewhere."""

from .holders import Answer, LocalHolder, SegmentHolder
from .remote import HolderLost, RemoteHolder
from .server import SegmentServer
from .step import Place, SegmentedAttention, SegmentedStep

__all__ = [
    "Answer",
    "HolderLost",
    "LocalHolder",
    "Place",
    "RemoteHolder",
    "SegmentHolder",
    "SegmentServer",
    "SegmentedAttention",
    "SegmentedStep",
]
