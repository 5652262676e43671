"""A byte-level GPT: pre-norm blocks, learned positions, tied embedding, dropout; made for tinyshakespeare.

Batch: `tokens` and `targets` int32 [rows, ctx]; targets are the tokens one place later.
"""

import jax
import jax.numpy as jnp
import optax


def init(key, *, layers, width, ctx, vocab):
    keys = iter(jax.random.split(key, 2 + 6 * layers))

    def normal(*shape, std=0.02):
        return std * jax.random.normal(next(keys), shape)

    def norm():
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    residual = 0.02 / (2 * layers) ** 0.5
    return {
        "wte": normal(vocab, width),
        "wpe": normal(ctx, width),
        "blocks": [
            {
                "norm1": norm(),
                "attn": {
                    "wq": normal(width, width),
                    "wk": normal(width, width),
                    "wv": normal(width, width),
                    "wo": normal(width, width, std=residual),
                },
                "norm2": norm(),
                "mlp": {
                    "up": normal(width, 4 * width),
                    "up_bias": jnp.zeros(4 * width),
                    "down": normal(4 * width, width, std=residual),
                    "down_bias": jnp.zeros(width),
                },
            }
            for _ in range(layers)
        ],
        "norm": norm(),
    }


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def drop(key, x, rate):
    if rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def attention(p, x, heads):
    b, t, d = x.shape
    q, k, v = ((x @ p[w]).reshape(b, t, heads, d // heads) for w in ("wq", "wk", "wv"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // heads) ** -0.5
    causal = jnp.tril(jnp.ones((t, t), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9).astype(jnp.float32)).astype(x.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, d) @ p["wo"]


def mlp(p, x):
    return jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def block(p, x, key, heads, dropout):
    k1, k2 = jax.random.split(key)
    x = x + drop(k1, attention(p["attn"], layer_norm(p["norm1"], x), heads), dropout)
    return x + drop(k2, mlp(p["mlp"], layer_norm(p["norm2"], x)), dropout)


def cross_entropy(logits, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == targets)}


def model(layers=4, width=128, heads=4, ctx=128, vocab=256, batch=16, microbatches=(2, 4, 16), dropout=0.1,
          learning_rate=1e-3, warmup=50, steps=1000, clip=1.0):  # fmt: skip
    def loss(params, batch, key):
        keys = jax.random.split(key, layers + 1)
        with jax.named_scope("embed"):
            x = params["wte"][batch["tokens"]] + params["wpe"]
            x = drop(keys[0], x, dropout)
        for i, p in enumerate(params["blocks"]):
            with jax.named_scope(f"block{i}"):
                x = block(p, x, keys[i + 1], heads, dropout)
        with jax.named_scope("head"):
            logits = layer_norm(params["norm"], x) @ params["wte"].T
            return cross_entropy(logits, batch["targets"])

    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, 0.1 * learning_rate)
    tokens = jax.ShapeDtypeStruct((batch, ctx), jnp.int32)
    return dict(
        init=lambda key: init(key, layers=layers, width=width, ctx=ctx, vocab=vocab),
        loss=loss,
        optimizer=optax.chain(
            optax.clip_by_global_norm(clip),
            optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        ),
        batch={"tokens": tokens, "targets": tokens},
        microbatches=list(microbatches),
    )
