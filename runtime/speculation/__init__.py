"""Tokens guessed ahead, which one step verifies together."""

from .draft_model import DraftModel
from .drafter import Drafter
from .prompt_lookup import PromptLookup
from .speculation import Speculation, SpeculationStats
from .surrogate import Surrogate

__all__ = [
    "DraftModel",
    "Drafter",
    "PromptLookup",
    "Speculation",
    "SpeculationStats",
    "Surrogate",
]
