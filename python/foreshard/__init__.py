"""Foreshard's exporter: a training step in JAX, written as a bundle that needs no Python.

    foreshard.export("my.bundle", init=..., loss=..., optimizer=..., batch=..., microbatches=[...])

Shell: `foreshard-export my_model.py -o my.bundle`.
"""

from .errors import ForeshardExportError
from .exporter import export
from .optim import master_weights

__version__ = "0.1.0"
__all__ = ["ForeshardExportError", "export", "master_weights"]
