"""What a model knows about directions."""
from .kinds import Dense, Diagonal
from .kronecker import Kronecker, mean_factor
from .operator import Operator, SolveWarning
from .units import MetricWarning, as_metric, as_numbers, clipped, damped, normalised

__all__ = [
    "Diagonal",
    "Dense",
    "Kronecker",
    "Operator",
    "as_metric",
    "as_numbers",
    "clipped",
    "damped",
    "normalised",
    "mean_factor",
    "MetricWarning",
    "SolveWarning",
]
