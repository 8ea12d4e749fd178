"""Runs a module on examples, and keeps a second moment."""
from .collecting import Statistics, curvature

__all__ = ["curvature", "Statistics"]
