"""Tries merges, and measures them."""
from .tune import Tuned, tune

__all__ = ["tune", "Tuned"]
