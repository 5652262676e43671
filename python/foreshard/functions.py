"""The three functions of a bundle, by the calling conventions of the manifest.

| function | inputs | outputs |
|---|---|---|
| init | key `uint32[2]` | params, slots |
| grad | params, batch (one microbatch), key `uint32[2]` | loss, metrics, gradients |
| update | params, slots, gradients summed over microbatches, their number `float32[]` | params, slots |
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
COUNT = jax.ShapeDtypeStruct((), jnp.float32)


def grad_dtype(dtype: Any) -> Any:
    """At least float32: sums over microbatches must not round to half width."""
    return jnp.promote_types(dtype, jnp.float32)


def make_init(init: Callable[..., Any], optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def function(key: Any) -> Any:
        params = init(key)
        return params, optimizer.init(params)

    function.__name__ = "init"
    return function


def with_metrics(loss: Callable[..., Any]) -> Callable[..., Any]:
    """`loss` as a function that always returns `(loss, metrics)`."""

    def function(params: Any, batch: Any, key: Any) -> Any:
        out = loss(params, batch, key)
        value, metrics = out if isinstance(out, tuple) else (out, {})
        return value, dict(metrics)  # a plain dict flattens sorted by name, as the manifest lists it

    return function


def make_grad(loss: Callable[..., Any]) -> Callable[..., Any]:
    def function(params: Any, batch: Any, key: Any) -> Any:
        (value, metrics), grads = jax.value_and_grad(with_metrics(loss), has_aux=True)(params, batch, key)
        to_f32 = lambda x: jnp.asarray(x).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g.astype(grad_dtype(g.dtype)), grads)
        return to_f32(value), jax.tree.map(to_f32, metrics), grads

    function.__name__ = "grad"
    return function


def make_update(optimizer: optax.GradientTransformation, narrow: bool) -> Callable[..., Any]:
    """`narrow`: the optimizer gets gradients of the params' own type, as it does in a plain training loop."""

    def function(params: Any, slots: Any, grads: Any, n: Any) -> Any:
        def mean(g: Any, p: Any) -> Any:
            g = g / n.astype(g.dtype)
            return g.astype(p.dtype) if narrow else g

        updates, slots = optimizer.update(jax.tree.map(mean, grads, params), slots, params)
        return optax.apply_updates(params, updates), slots

    function.__name__ = "update"
    return function
