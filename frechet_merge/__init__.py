"""Merge neural networks as Fréchet means."""
__version__ = "0.1.0"

from .checkpoints import MergeError, load
from .geometries.lora import LoRA
from .geometries.sphere import Sphere
from .geometry import FLAT, Chart, Euclidean, Geometry, Needs, Point, Space
from .laws import check_geometry
from .mean import ConvergenceWarning, Mean, frechet_mean
from .merging.merge import Merged, merge
from .span import Span

__all__ = ["merge", "frechet_mean", "load", "check_geometry", "Geometry", "Chart", "Point", "Space", "FLAT", "Needs",
           "Euclidean", "Sphere", "Span", "LoRA", "Mean", "ConvergenceWarning", "Merged", "MergeError"]
