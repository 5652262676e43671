"""`foreshard.torch.export`: from a model in PyTorch to a bundle, through torchax.

torchax runs PyTorch code on JAX arrays, so that the training step is traced as JAX's own: nothing of PyTorch is left
in the bundle. Differentiation and the optimizer are JAX's and optax's.
"""

from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import exporter
from .errors import ForeshardExportError

try:
    import torch
    import torchax
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.utils.stateless import _reparametrize_module
    from torchax.ops.mappings import t2j
except ImportError as e:
    raise ImportError(f"foreshard.torch needs PyTorch and torchax ({e}): pip install 'foreshard[torch]'") from e


def export(
    path: str | Path,
    module: "torch.nn.Module",
    *,
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    microbatches: Sequence[int] | None = None,
    buckets: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    name: str | None = None,
    progress: exporter.Progress | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Traces a PyTorch model and writes it as a bundle. The module's parameters become the start weights.

    Args:
        path, optimizer, batch, microbatches, buckets, name, progress, provenance: as in `foreshard.export`; the
            optimizer is optax's.
        module: its trainable parameters are the params, by their names in `named_parameters()`, shared ones once.
            Buffers and frozen parameters become constants of the graphs. It is traced in the mode it is in: call
            `.train()` for dropout, whose random numbers then come from the step's key.
        loss: `loss(module, batch) -> loss` or `(loss, {name: scalar})`, PyTorch code; `batch` holds tensors. Both
            results are means over the rows.

    Returns:
        `path`.

    Raises:
        ForeshardExportError: names the argument, what was found there and the way out.
    """
    versions = {"torch": torch.__version__, "torchax": torchax.__version__}
    return exporter.export(
        path,
        **in_jax(module=module, loss=loss, optimizer=optimizer, batch=batch),
        microbatches=microbatches,
        buckets=buckets,
        name=name,
        progress=progress,
        provenance=versions | dict(provenance or {}),
    )


def in_jax(*, module: "torch.nn.Module", loss: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The same model as arguments of `foreshard.export`."""
    if not isinstance(module, torch.nn.Module):
        raise ForeshardExportError(f"module: {module!r} is not a torch.nn.Module; pass the model itself")
    exporter.check_arguments("loss", loss, ("module", "batch"))
    check_statistics(module)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ForeshardExportError("module: it has no parameter with requires_grad, so there is nothing to train")
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    params = {n: to_array(p) for n, p in trained.items()}
    constants = {n: to_array(t) for n, t in {**frozen, **dict(module.named_buffers())}.items()}
    environment = torchax.default_env()

    # The params' true start is `weights`; init only gives their shapes, and the slots.
    def init(key: Any) -> Any:
        return {n: jnp.zeros(p.shape, p.dtype) for n, p in params.items()}

    def jax_loss(params: Any, batch: Any, key: Any) -> Any:
        view = torchax.interop.torch_view
        tensors = view({**constants, **params})
        with environment, environment.override_property(prng=key):
            with _reparametrize_module(module, tensors, tie_weights=True):
                out = loss(module, view(dict(batch)))
        return jax.tree.map(to_jax, out, is_leaf=lambda x: isinstance(x, torch.Tensor))

    return {"init": init, "loss": jax_loss, "weights": params, **options}


def to_jax(x: Any) -> Any:
    return torchax.interop.jax_view(x) if isinstance(x, torch.Tensor) else x


def to_array(t: "torch.Tensor") -> jax.Array:
    """A copy: the module may go on training in PyTorch."""
    # In JAX's own types: without jax_enable_x64 a 64-bit buffer, such as a position index, becomes a 32-bit one.
    return jnp.array(np.asarray(t2j(t.detach().cpu(), use_dlpack=False)))


def check_statistics(module: "torch.nn.Module") -> None:
    for name, child in module.named_modules():
        if isinstance(child, _NormBase) and child.training and child.track_running_stats:
            raise ForeshardExportError(
                f"module: {name or 'it'!r} ({type(child).__name__}) keeps running statistics while it trains, which "
                "are not gradients; use GroupNorm or LayerNorm, track_running_stats=False, or .eval() to freeze them"
            )
