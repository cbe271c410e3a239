"""Tokens of requests that other engines have."""

from .loans import Creditor, Loans

__all__ = ["Creditor", "Loans"]
