"""Opens what Hugging Face has, to be run."""
from .examples import batches, examples
from .models import collect, open_model

__all__ = ["open_model", "collect", "examples", "batches"]
