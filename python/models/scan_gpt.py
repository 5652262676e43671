"""A GPT whose layers are one `lax.scan` over stacked params, in bfloat16 with float32 master weights.

Foreshard takes the stack apart: each layer's params, gradients and optimizer slots live on the shard that runs it.
"""

import jax
import jax.numpy as jnp
import optax

from foreshard import master_weights


def norm(scale, x):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def model(layers=4, width=64, heads=4, ctx=64, vocab=256, batch=16, microbatches=(4, 16), learning_rate=3e-4):
    def init(key):
        k = jax.random.split(key, 7)

        def normal(key, *shape, std=0.02):
            return (std * jax.random.normal(key, shape)).astype(jnp.bfloat16)

        def stack(key, *shape):
            return normal(key, layers, *shape)

        ones = jnp.ones((layers, width), jnp.bfloat16)
        return {
            "embed": normal(k[0], vocab, width),
            "positions": normal(k[1], ctx, width),
            "layers": {
                "norm1": ones,
                "qkv": stack(k[2], width, 3 * width),
                "out": stack(k[3], width, width),
                "norm2": ones,
                "up": stack(k[4], width, 4 * width),
                "down": stack(k[5], 4 * width, width),
            },
            "head": normal(k[6], width, vocab),
        }

    def layer(x, p):
        b, t, _ = x.shape
        qkv = (norm(p["norm1"], x) @ p["qkv"]).reshape(b, t, 3, heads, width // heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * (width // heads) ** -0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(x.dtype), v).reshape(b, t, width)
        x = x + mixed @ p["out"]
        return x + jax.nn.gelu(norm(p["norm2"], x) @ p["up"]) @ p["down"], None

    def loss(params, batch, key):
        with jax.named_scope("embed"):
            x = params["embed"][batch["tokens"]] + params["positions"]
        x, _ = jax.lax.scan(layer, x, params["layers"])
        with jax.named_scope("head"):
            logits = (x @ params["head"]).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    tokens = jax.ShapeDtypeStruct((batch, ctx), jnp.int32)
    return dict(
        init=init,
        loss=loss,
        optimizer=master_weights(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))),
        batch={"tokens": tokens, "targets": tokens},
        microbatches=list(microbatches),
    )
