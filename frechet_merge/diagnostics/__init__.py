"""Asks about models, and merges nothing."""
from .inspection import Inspection, inspect

__all__ = ["inspect", "Inspection"]
