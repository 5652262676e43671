"""A small MLP on the 8x8 digits: `x` float32 [rows, 64] in 0..1, `y` int32 [rows]."""

import jax
import jax.numpy as jnp
import optax


def model(batch=64, width=128, microbatches=(16, 64)):
    sizes = [64, width, width, 10]

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return {
            f"layer{i}": {
                "w": jax.random.normal(k, (m, n)) * (2.0 / m) ** 0.5,
                "b": jnp.zeros(n),
            }
            for i, (k, m, n) in enumerate(zip(keys, sizes, sizes[1:]))
        }

    def loss(params, batch, key):
        h = batch["x"]
        for i in range(len(sizes) - 1):
            with jax.named_scope(f"layer{i}"):
                p = params[f"layer{i}"]
                h = h @ p["w"] + p["b"]
                if i < len(sizes) - 2:
                    h = jax.nn.relu(h)
        losses = optax.softmax_cross_entropy_with_integer_labels(h, batch["y"])
        return losses.mean(), {"accuracy": jnp.mean(h.argmax(-1) == batch["y"])}

    return dict(
        init=init,
        loss=loss,
        optimizer=optax.adam(1e-3),
        batch={
            "x": jax.ShapeDtypeStruct((batch, 64), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch,), jnp.int32),
        },
        microbatches=list(microbatches),
    )
