"""Optimizers beyond optax's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterWeightsState(NamedTuple):
    master: Any
    inner: Any


def master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets half-width params (bf16, f16) train like float32 ones.

    The optimizer sees and keeps float32: its moments, and a master copy of every param. The model's params are
    the masters rounded. Gradients arrive in float32, averaged over microbatches before anything is rounded.
    """

    def widen(x: Any) -> Any:
        return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))

    def init(params: Any) -> MasterWeightsState:
        master = jax.tree.map(widen, params)
        return MasterWeightsState(master, optimizer.init(master))

    def update(grads: Any, state: MasterWeightsState, params: Any = None) -> tuple[Any, MasterWeightsState]:
        if params is None:
            raise ValueError("master_weights needs params: call update(grads, state, params)")
        updates, inner = optimizer.update(jax.tree.map(widen, grads), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        # apply_updates adds in float32 and rounds once, so params become the rounded masters.
        steps = jax.tree.map(lambda m, p: m - widen(p), master, params)
        return steps, MasterWeightsState(master, inner)

    return optax.GradientTransformation(init, update)
