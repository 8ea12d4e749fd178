"""Runs a module on examples, and keeps a second moment."""
from .collecting import Statistics, curvature
from .estimators import hessian_columns
from .forms import projected_diagonal, projected_kronecker

__all__ = ["curvature", "Statistics", "hessian_columns", "projected_diagonal", "projected_kronecker"]
