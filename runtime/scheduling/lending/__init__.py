"""Tokens of requests that other engines have."""

from .gaps import Gaps
from .loans import Creditor, Loans

__all__ = ["Creditor", "Gaps", "Loans"]
