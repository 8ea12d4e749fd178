"""Merge neural networks as Fréchet means."""
__version__ = "0.1.0"

from . import _former  # noqa: F401
from .files.open import load
from .geometries.geometry import Chart, Euclidean, Geometry, Needs
from .geometries.laws import check_geometry
from .geometries.lora import LoRA
from .geometries.span import Span
from .geometries.sphere import Sphere
from .merging.live import add_merged_adapter
from .merging.merge import Merged, merge
from .messages import MergeError
from .spaces.mean import ConvergenceWarning, Mean, frechet_mean
from .spaces.space import FLAT, Point, Space

__all__ = [
    "merge",
    "add_merged_adapter",
    "frechet_mean",
    "load",
    "check_geometry",
    "Geometry",
    "Chart",
    "Point",
    "Space",
    "FLAT",
    "Needs",
    "Euclidean",
    "Sphere",
    "Span",
    "LoRA",
    "Mean",
    "ConvergenceWarning",
    "Merged",
    "MergeError",
]
