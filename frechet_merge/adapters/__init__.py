"""What an adapter means."""
from .baking import bake
from .dialects import layers
from .peft import Layer

__all__ = ["Layer", "layers", "bake"]
