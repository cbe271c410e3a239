"""Tokens guessed ahead, which one step verifies together."""

from .drafter import Drafter
from .prompt_lookup import PromptLookup
from .speculation import Speculation

__all__ = ["Drafter", "PromptLookup", "Speculation"]
