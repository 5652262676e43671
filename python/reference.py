"""Plain JAX training of a sample model: what Foreshard's runs are compared with.

    python reference.py models/char_gpt.py batches.safetensors --microbatch 4 -o reference.safetensors

Trains with `jax.grad` and optax on the model's own Python, not on its bundle. The batches file holds one tensor per
batch tensor, with the rows of all steps one after the other. Writes the params after the last step, by the names of the bundle, and
`losses` (float32 [steps]).

`--bench` prints the median seconds of a step as JSON instead.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from foreshard import cli, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="options")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--microbatch", type=int, help="rows; default: the whole batch")
    parser.add_argument("--bench", action="store_true")
    args = parser.parse_args()
    options = {k: json.loads(v) for k, v in (o.split("=", 1) for o in args.options)}
    model, _ = cli.load_model(args.model, options)
    if "module" in model:
        from foreshard.torch import in_jax

        model = in_jax(**model)
    rows = next(iter(model["batch"].values())).shape[0]
    batches = {k: v.reshape(-1, rows, *v.shape[1:]) for k, v in load_file(args.batches).items()}
    steps = min(len(b) for b in batches.values())
    n = rows // (args.microbatch or rows)

    def loss_and_metrics(params, batch, key):
        out = model["loss"](params, batch, key)
        return out if isinstance(out, tuple) else (out, {})

    @jax.jit
    def grad(params, batch, key):
        (loss, _), grads = jax.value_and_grad(loss_and_metrics, has_aux=True)(params, batch, key)
        return loss, jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)

    @jax.jit
    def update(params, slots, grads):
        updates, slots = model["optimizer"].update(jax.tree.map(lambda g: g / n, grads), slots, params)
        return optax.apply_updates(params, updates), slots

    # Donated, as a training loop in JAX does and as Foreshard does.
    @partial(jax.jit, donate_argnums=(0, 1))
    def whole(params, slots, batch, key):
        loss, grads = grad(params, batch, key)
        params, slots = update(params, slots, grads)
        return loss, params, slots

    params = model.get("weights") or jax.jit(model["init"])(jax.random.PRNGKey(args.seed))
    slots = jax.jit(model["optimizer"].init)(params)
    seed = jax.random.PRNGKey(args.seed)
    losses, times = [], []
    for step in range(steps):
        began = time.perf_counter()
        batch = {k: jnp.asarray(v[step]) for k, v in batches.items()}
        step_key = jax.random.fold_in(seed, step)
        if args.bench and n == 1:
            loss, params, slots = whole(params, slots, batch, jax.random.fold_in(step_key, 0))
        else:
            total, loss = None, 0.0
            for m in range(n):
                part = {k: v.reshape(n, -1, *v.shape[1:])[m] for k, v in batch.items()}
                value, grads = grad(params, part, jax.random.fold_in(step_key, m))
                loss = loss + value
                total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            loss = loss / n
            params, slots = update(params, slots, total)
        losses.append(float(loss))
        jax.block_until_ready(params)
        times.append(time.perf_counter() - began)
    if args.bench:
        print(json.dumps({"step_seconds": float(np.median(times[2:])), "steps": steps, "loss": losses[-1]}))
    if args.output:
        paths, leaves = names.flatten(params)
        tensors = {n: np.asarray(x) for n, x in zip(names.unique_names("init", paths), leaves)}
        save_file({**tensors, "losses": np.asarray(losses, np.float32)}, args.output)


if __name__ == "__main__":
    main()
