"""Three equal layers in one stacked param: the smallest model that Foreshard takes apart.

    foreshard-export tests/data/stack.py -o tests/data/stack.bundle
"""

import jax
import jax.numpy as jnp
import optax


def model():
    def init(key):
        return {"w": jnp.full((3, 2, 2), 0.5), "out": jnp.ones(2)}

    def loss(params, batch, key):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], params["w"])
        return jnp.square(x @ params["out"] - batch["y"]).mean()

    rows = lambda *shape: jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    return dict(
        init=init, loss=loss, optimizer=optax.sgd(0.1, momentum=0.9), batch={"x": rows(2), "y": rows()}, microbatches=[2]
    )
