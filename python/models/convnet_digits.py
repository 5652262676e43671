"""A small convnet on the 8x8 digits: `x` float32 [rows, 64] in 0..1, `y` int32 [rows]."""

import jax
import jax.numpy as jnp
import optax

LAYOUT = ("NHWC", "HWIO", "NHWC")


def model(batch=64, width=16, microbatches=(16, 64)):
    def init(key):
        k1, k2, k3 = jax.random.split(key, 3)
        return {
            "conv1": {"w": jax.random.normal(k1, (3, 3, 1, width)) / 3.0, "b": jnp.zeros(width)},
            "conv2": {"w": jax.random.normal(k2, (3, 3, width, 2 * width)) * (9.0 * width / 2) ** -0.5,
                      "b": jnp.zeros(2 * width)},
            "head": {"w": jax.random.normal(k3, (8 * width, 10)) * (8.0 * width) ** -0.5, "b": jnp.zeros(10)},
        }  # fmt: skip

    def conv(p, x):
        return jax.nn.relu(jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=LAYOUT) + p["b"])

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def loss(params, batch, key):
        x = batch["x"].reshape(-1, 8, 8, 1)
        with jax.named_scope("conv1"):
            x = pool(conv(params["conv1"], x))
        with jax.named_scope("conv2"):
            x = pool(conv(params["conv2"], x))
        with jax.named_scope("head"):
            logits = x.reshape(x.shape[0], -1) @ params["head"]["w"] + params["head"]["b"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
            return losses.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == batch["y"])}

    return dict(
        init=init,
        loss=loss,
        optimizer=optax.sgd(0.05, momentum=0.9),
        batch={
            "x": jax.ShapeDtypeStruct((batch, 64), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch,), jnp.int32),
        },
        microbatches=list(microbatches),
    )
