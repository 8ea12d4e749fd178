"""What an adapter means."""
from .baking import bake
from .peft import Layer, layers

__all__ = ["Layer", "layers", "bake"]
