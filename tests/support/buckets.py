"""A model with shape buckets, rows for it, and what plain JAX makes of them: `python buckets.py DIRECTORY`.

Writes `bag.bundle`, `rows.jsonl` and `losses.json`.
"""

import json
import random
import sys
from pathlib import Path

import foreshard
import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH = 8
LENGTHS = [8, 16, 32]


def init(key):
    keys = jax.random.split(key, 3)
    shapes = {"embed": (32, 16), "hidden": (16, 32), "out": (32, 2)}
    return {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def loss(params, batch, key):
    """Classifies bags of tokens; 0 is padding."""
    there = (batch["tokens"] != 0)[..., None]
    mean = (params["embed"][batch["tokens"]] * there).sum(1) / jnp.maximum(there.sum(1), 1)
    logits = jax.nn.relu(mean @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def batches(rows):
    """In stored order: a batch is complete when its bucket has filled it."""
    waiting = {n: [] for n in LENGTHS}
    for row in rows:
        n = min(n for n in LENGTHS if n >= len(row["tokens"]))
        waiting[n].append(row)
        if len(waiting[n]) == BATCH:
            tokens = [r["tokens"] + [0] * (n - len(r["tokens"])) for r in waiting[n]]
            yield {"tokens": np.array(tokens, np.int32), "y": np.array([r["y"] for r in waiting[n]], np.int32)}
            waiting[n] = []


def main() -> None:
    target = Path(sys.argv[1])
    optimizer = optax.adam(1e-2)
    foreshard.export(
        target / "bag.bundle",
        init=init,
        loss=loss,
        optimizer=optimizer,
        batch={
            "tokens": jax.ShapeDtypeStruct((BATCH, LENGTHS[-1]), jnp.int32),
            "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        },
        microbatches=[4],
        buckets={f"t{n}": {"tokens": (n,)} for n in LENGTHS[:-1]},
    )
    random.seed(1)
    labels = [random.randrange(2) for _ in range(300)]
    rows = [{"tokens": [random.randrange(1, 17) + 15 * y for _ in range(random.randint(1, 32))], "y": y} for y in labels]
    (target / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    params = init(jax.random.PRNGKey(0))
    state = optimizer.init(params)
    losses = []
    for batch in batches(rows):
        value, grads = jax.value_and_grad(loss)(params, batch, None)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append((batch["tokens"].shape[1], float(value)))
    (target / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
