"""Foreshard's exporter: a training step in JAX or PyTorch, written as a bundle that needs no Python.

    foreshard.export("my.bundle", init=..., loss=..., optimizer=..., batch=..., microbatches=[...])

PyTorch: `foreshard.torch.export`. Shell: `foreshard-export my_model.py -o my.bundle`.
"""

__version__ = "0.1.0"  # before the imports: a bundle's provenance reads it

from .errors import ForeshardExportError
from .exporter import export
from .optim import master_weights

__all__ = ["ForeshardExportError", "export", "master_weights"]
