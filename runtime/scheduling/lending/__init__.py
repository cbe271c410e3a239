"""Tokens of requests that other engines have."""

from .gaps import Gaps, tokens_in
from .loans import Creditor, Loans

__all__ = ["Creditor", "Gaps", "Loans", "tokens_in"]
