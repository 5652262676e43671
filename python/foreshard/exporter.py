"""`foreshard.export`: from a model in JAX to a bundle."""

import importlib.metadata
import inspect
import numbers
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np
import optax
from jax.tree_util import keystr
from safetensors.numpy import save as save_safetensors

from . import __version__, bundle, functions, lowering, names
from .errors import ForeshardExportError

DTYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16",
    "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip

Shapes = dict[str, jax.ShapeDtypeStruct]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One shape of microbatch, and so one grad graph."""

    name: str
    microbatch: int
    shapes: Shapes


def export(
    path: str | Path,
    *,
    init: Callable[..., Any],
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    microbatches: Sequence[int] | None = None,
    buckets: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    name: str | None = None,
    weights: Any = None,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Traces a model and writes it as a bundle; nothing is trained and no data is needed.

    Args:
        path: the bundle's directory. An older bundle there is replaced, anything else is left alone.
        init: `init(key) -> params`, any pytree of floating arrays. `key` is a raw threefry key, `uint32[2]`.
        loss: `loss(params, batch, key) -> loss` or `(loss, {name: scalar})`. Both are *means* over the rows of
            `batch`: a step averages them over its microbatches.
        optimizer: an optax transformation. It sees the mean gradient of the global batch.
        batch: `{name: jax.ShapeDtypeStruct}` of the global batch; the leading axis of each counts its rows.
        microbatches: rows of the microbatches to export; each divides the batch. Default: the whole batch only.
        buckets: `{bucket: {tensor: shape of one row}}`, further shapes of the batch, as in
            `{"t64": {"tokens": (64,), "targets": (64,)}}`. Tensors not named keep their shape. Every bucket is
            exported for every microbatch size.
        name: the model's name. Default: the file name of `path`.
        weights: params to start from, shaped like `init`'s; written as `weights.safetensors`.
        progress: called with a line per stage of the work.
        provenance: entries added to the manifest's, for people to read.

    Returns:
        `path`.

    Raises:
        ForeshardExportError: names the argument, what was found there and the way out.
    """
    path = Path(path)
    say = progress or (lambda _: None)
    bundle.check_target(path)
    check_prng()
    shapes, rows = check_batch(batch)
    variants = check_variants(shapes, rows, microbatches, buckets)
    check_arguments("init", init, ("key",))
    check_arguments("loss", loss, ("params", "batch", "key"))
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ForeshardExportError(
            f"optimizer: {optimizer!r} has no init and update; pass an optax optimizer such as optax.adamw(3e-4)"
        )

    # Names and shapes.
    params = trace("init", check_params, init)
    param_paths, param_leaves = names.flatten(params)
    param_names = names.unique_names("init", param_paths)
    slots = plain_shapes(trace("optimizer", jax.eval_shape, optimizer.init, params))
    slot_paths, slot_leaves = names.flatten(slots)
    slot_names = names.unique_names("optimizer", slot_paths, prefix="opt.", taken=param_names)
    for n, leaf in zip(param_names + slot_names, param_leaves + slot_leaves):
        check_dtype(n, leaf.dtype)
    slot_owners = names.owners(slot_paths, slot_leaves, param_paths, param_leaves)
    n_elements = sum(int(np.prod(p.shape)) for p in param_leaves)
    say(f"{len(param_names)} params, {n_elements:,} elements, {len(slot_names)} optimizer slots")

    # The functions.
    files = bundle.Files()

    def add(function: Callable[..., Any], file: str, *args: Any) -> dict[str, Any]:
        hlo, stablehlo = trace(function.__name__, lowering.lower, function, args)
        spec = {"hlo": files.add(f"{file}.hlo.pb", hlo), "stablehlo": files.add(f"{file}.stablehlo", stablehlo)}
        say(f"{file}: {len(hlo) / 1e3:,.0f} kB")
        return spec

    init_spec = add(functions.make_init(init, optimizer), "init", functions.KEY)
    grad_specs, metrics = [], None
    for v in variants:
        found = check_loss(loss, params, v.shapes)
        if metrics is not None and metrics != found:
            raise ForeshardExportError(
                f"loss: metrics are {metrics} for the first variant and {found} for {v.name!r}; return the same for "
                "every batch shape"
            )
        metrics = found
        spec = add(functions.make_grad(loss), f"grad/{v.name}", params, v.shapes, functions.KEY)
        shape_of = {n: list(s.shape) for n, s in v.shapes.items()}
        grad_specs.append({"name": v.name, "microbatch": v.microbatch, "shapes": shape_of} | spec)
    update, grads = check_update(optimizer, params, slots)
    update_spec = add(update, "update", params, slots, grads, functions.COUNT)
    weights_spec = None
    if weights is not None:
        tensors = start_weights(weights, params, param_names, slot_names, optimizer, init)
        weights_spec = files.add("weights.safetensors", save_safetensors(tensors))

    def tensor(n: str, leaf: Any) -> dict[str, Any]:
        return {"name": n, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}

    manifest = {
        "format": bundle.FORMAT,
        "name": name or path.name.removesuffix(".bundle"),
        "batch_size": rows,
        "params": [
            tensor(n, p) | {"grad_dtype": str(g.dtype)}
            for n, p, g in zip(param_names, param_leaves, jax.tree.leaves(grads))
        ],
        "slots": [
            tensor(n, s) | ({} if o is None else {"param": param_names[o]})
            for n, s, o in zip(slot_names, slot_leaves, slot_owners)
        ],
        "batch": [tensor(n, s) for n, s in shapes.items()],
        "metrics": [{"name": n, "dtype": "float32", "shape": []} for n in metrics or []],
        "init": init_spec,
        "grad": grad_specs,
        "update": update_spec,
    }
    if weights_spec:
        manifest["weights"] = weights_spec
    versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "optax")}
    manifest["provenance"] = {"foreshard": __version__} | versions | dict(provenance or {})
    bundle.write(path, manifest, files)
    say(f"wrote {path}: {len(files.contents)} files, {files.n_bytes / 1e6:.2f} MB")
    return path


# Checks. Each names its argument, the value found and the way out.


def check_prng() -> None:
    impl = jax.config.values["jax_default_prng_impl"]
    if impl != "threefry2x32":
        raise ForeshardExportError(
            f"jax_default_prng_impl is {impl!r}; keys of a bundle are threefry, so set it to 'threefry2x32'"
        )


def check_dtype(name: str, dtype: Any) -> None:
    if str(dtype) not in DTYPES:
        raise ForeshardExportError(f"{name!r} has type {dtype}, which bundles cannot hold; use one of {sorted(DTYPES)}")


def check_batch(batch: Mapping[str, Any]) -> tuple[Shapes, int]:
    """Shapes in the order in which JAX flattens a dict, and the rows they agree on."""
    if not isinstance(batch, Mapping) or not batch:
        raise ForeshardExportError(
            f"batch: {batch!r} is not a dict of named tensors; pass "
            "{'x': jax.ShapeDtypeStruct((rows, ...), jnp.float32), ...}"
        )
    shapes: Shapes = {}
    for n in sorted(batch, key=str):
        s = batch[n]
        if not isinstance(n, str):
            raise ForeshardExportError(f"batch: the name {n!r} is not a string; name every tensor, as in {{'x': ...}}")
        if not hasattr(s, "shape") or not hasattr(s, "dtype"):
            raise ForeshardExportError(
                f"batch[{n!r}]: {s!r} has no shape and dtype; pass jax.ShapeDtypeStruct((rows, ...), dtype)"
            )
        if len(s.shape) == 0:
            raise ForeshardExportError(
                f"batch[{n!r}]: shape () lacks the leading axis, which counts the rows of the batch; give it one, "
                f"as in ({next((x.shape[0] for x in batch.values() if getattr(x, 'shape', ())), 8)},)"
            )
        check_dtype(f"batch[{n!r}]", s.dtype)
        shapes[n] = jax.ShapeDtypeStruct(tuple(int(d) for d in s.shape), s.dtype)
    first, *rest = shapes
    rows = shapes[first].shape[0]
    for n in rest:
        if shapes[n].shape[0] != rows:
            raise ForeshardExportError(
                f"batch[{n!r}]: shape {shapes[n].shape} has {shapes[n].shape[0]} rows where batch[{first!r}] has "
                f"{rows}; the leading axis of every tensor counts the rows of the batch"
            )
    if rows == 0:
        raise ForeshardExportError(f"batch[{first!r}]: the leading axis is 0; a batch has at least one row")
    return shapes, rows


def check_variants(shapes: Shapes, rows: int, microbatches: Sequence[int] | None,
                   buckets: Mapping[str, Mapping[str, Sequence[int]]] | None) -> list[Variant]:
    sizes = [rows] if microbatches is None else list(microbatches)
    if not sizes:
        raise ForeshardExportError(f"microbatches: the list is empty; name at least one size, such as [{rows}]")
    for m in sizes:
        if not isinstance(m, numbers.Integral) or isinstance(m, bool) or m < 1 or rows % m:
            divisors = [d for d in range(1, rows + 1) if rows % d == 0]
            raise ForeshardExportError(
                f"microbatches: {m!r} rows do not divide the batch of {rows}; choose among {divisors}"
            )
    all_buckets: dict[str, Shapes] = {"": shapes}
    for bucket, tensors in (buckets or {}).items():
        if not bucket or not all(c.isalnum() or c == "_" for c in bucket):
            raise ForeshardExportError(
                f"buckets: the name {bucket!r} becomes part of a file name; use letters, digits and _"
            )
        changed = dict(shapes)
        for n, row in tensors.items():
            if n not in shapes:
                raise ForeshardExportError(
                    f"buckets[{bucket!r}]: {n!r} is no tensor of the batch, which has {list(shapes)}"
                )
            if len(row) != len(shapes[n].shape) - 1:
                raise ForeshardExportError(
                    f"buckets[{bucket!r}][{n!r}]: {tuple(row)} has {len(row)} axes where a row of the batch has "
                    f"{len(shapes[n].shape) - 1}: {shapes[n].shape[1:]}; leave the leading axis out"
                )
            changed[n] = jax.ShapeDtypeStruct((rows, *(int(d) for d in row)), shapes[n].dtype)
        all_buckets[bucket] = changed
    return [
        Variant(
            f"mb{m}-{bucket}" if bucket else f"mb{m}",
            int(m),
            {n: jax.ShapeDtypeStruct((int(m), *s.shape[1:]), s.dtype) for n, s in tensors.items()},
        )
        for bucket, tensors in all_buckets.items()
        for m in sorted(set(sizes))
    ]


def check_arguments(what: str, function: Callable[..., Any], wanted: tuple[str, ...]) -> None:
    if not callable(function):
        raise ForeshardExportError(f"{what}: {function!r} is not a function of ({', '.join(wanted)})")
    try:
        signature = inspect.signature(function)
        signature.bind(*wanted)
    except TypeError:
        raise ForeshardExportError(
            f"{what}: it takes {signature} and is called with ({', '.join(wanted)}); unused arguments may be ignored "
            "but must be there"
        ) from None
    except ValueError:  # built in, without a signature
        pass


def check_params(init: Callable[..., Any]) -> Any:
    """Shapes of what `init` returns."""

    def function(key: Any) -> Any:
        params = init(key)
        paths, leaves = names.flatten(params)
        if not leaves:
            raise ForeshardExportError(f"init: it returned {params!r}, which holds no arrays; return the params")
        for path, leaf in zip(paths, leaves):
            where = f"init: the leaf {names.flat_name(path)!r}"
            if not isinstance(leaf, (jax.Array, np.ndarray)):
                raise ForeshardExportError(
                    f"{where} is {leaf!r} of type {type(leaf).__name__}, not an array; wrap it in jnp.asarray, or "
                    "keep constants out of params"
                )
            if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
                raise ForeshardExportError(
                    f"{where} has type {leaf.dtype}, which has no gradient; params are floating, so keep constants "
                    "out of them (a closure or a module's constant will do)"
                )
        return params

    return plain_shapes(jax.eval_shape(function, functions.KEY))


def plain_shapes(tree: Any) -> Any:
    """Without weak types, which would make a graph's outputs differ from its inputs."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), tree)


def check_loss(loss: Callable[..., Any], params: Any, shapes: Shapes) -> list[str]:
    """Names of the metrics, in the order in which JAX flattens them."""

    def function(params: Any, batch: Any, key: Any) -> Any:
        out = loss(params, batch, key)
        if isinstance(out, tuple) and len(out) != 2:
            raise ForeshardExportError(
                f"loss: it returned a tuple of {len(out)}; return the loss, or (loss, {{name: metric}})"
            )
        value, metrics = out if isinstance(out, tuple) else (out, {})
        check_scalar("loss: it", value, "return its mean over the rows, such as jnp.mean(losses)")
        if not jax.numpy.issubdtype(jax.numpy.result_type(value), jax.numpy.floating):
            raise ForeshardExportError(
                f"loss: it has type {jax.numpy.result_type(value)}, which has no gradient; return a floating scalar"
            )
        if not isinstance(metrics, Mapping) or not all(isinstance(k, str) for k in metrics):
            raise ForeshardExportError(
                f"loss: its second result is {type(metrics).__name__}, not a dict of named metrics; return "
                "(loss, {'accuracy': ...})"
            )
        for n, m in metrics.items():
            check_scalar(f"loss: metric {n!r}", m, "return its mean over the rows")
        return value, dict(metrics)

    _, metrics = trace("loss", jax.eval_shape, function, params, shapes, functions.KEY)
    return sorted(metrics)


def check_scalar(what: str, value: Any, way_out: str) -> None:
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, int, float)):
        raise ForeshardExportError(f"{what} is {type(value).__name__}, not a scalar array; {way_out}")
    if np.shape(value) != ():
        raise ForeshardExportError(f"{what} has shape {np.shape(value)} and must be a scalar; {way_out}")


def check_update(optimizer: optax.GradientTransformation, params: Any, slots: Any) -> tuple[Callable[..., Any], Any]:
    """The update function, and the shapes of the summed gradients it takes.

    State must keep its types from step to step. Where the optimizer keeps them only for gradients of the params'
    own type (Adam on bf16 params without master weights), it gets those.
    """
    grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, functions.grad_dtype(p.dtype)), params)
    for narrow in (False, True):
        update = functions.make_update(optimizer, narrow)
        out = trace("optimizer", jax.eval_shape, update, params, slots, grads, functions.COUNT)
        if plain_shapes(out) == (params, slots):
            return update, grads
    before, after = dict(zip(*names.flatten((params, slots)))), dict(zip(*names.flatten(plain_shapes(out))))
    path = next((p for p in before if before[p] != after.get(p)), None)
    found = "leaves come or go" if path is None else f"{keystr(path)} goes from {before[path]} to {after.get(path)}"
    raise ForeshardExportError(
        f"optimizer: its state changes shape or type in a step ({found}); state must stay as init made it"
    )


def start_weights(weights: Any, params: Any, param_names: list[str], slot_names: list[str],
                  optimizer: optax.GradientTransformation, init: Callable[..., Any]) -> dict[str, np.ndarray]:
    """The tensors of `weights.safetensors`: every param, and each slot whose start depends on the params.

    Slots such as Adam's moments start from zero whatever the params are and stay out; master copies come along.
    """
    paths, leaves = names.flatten(params)
    given_paths, given = names.flatten(weights)
    if given_paths != paths:
        missing = [names.flat_name(p) for p in paths if p not in given_paths]
        extra = [names.flat_name(p) for p in given_paths if p not in paths]
        raise ForeshardExportError(
            f"weights: their tree differs from init's (missing {missing[:5]}, unknown {extra[:5]}); give one array for "
            "every param"
        )
    for n, w, p in zip(param_names, given, leaves):
        if not hasattr(w, "shape") or tuple(w.shape) != p.shape or w.dtype != p.dtype:
            raise ForeshardExportError(f"weights: {n!r} is {describe(w)} where init makes {describe(p)}")
        if not np.isfinite(np.asarray(w, dtype=np.float64)).all():
            raise ForeshardExportError(f"weights: {n!r} holds NaN or infinity; start from finite weights")
    tensors = {n: np.asarray(w) for n, w in zip(param_names, given)}
    here = jax.tree.leaves(jax.jit(optimizer.init)(jax.tree.map(jax.numpy.asarray, weights)))
    there = jax.tree.leaves(jax.jit(functions.make_init(init, optimizer))(jax.random.PRNGKey(0))[1])
    for n, a, b in zip(slot_names, here, there):
        if not np.array_equal(np.asarray(a), np.asarray(b)):
            tensors[n] = np.asarray(a)
    return {n: np.ascontiguousarray(t) for n, t in sorted(tensors.items())}


def describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)


def trace(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function`, which traces the user's code, and turns what JAX says about it into our words."""
    try:
        return function(*args)
    except ForeshardExportError:
        raise
    except (jax.errors.TracerBoolConversionError, jax.errors.TracerIntegerConversionError) as e:
        raise ForeshardExportError(
            f"{what}: {where(e)} branches or indexes on a value that is known only when the graph runs; use lax.cond "
            "or jnp.where for branches, lax.scan or lax.fori_loop for loops, lax.dynamic_slice for indices"
        ) from e
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as e:
        raise ForeshardExportError(
            f"{what}: {where(e)} needs a value that is known only when the graph runs (numpy, float() or print on a "
            "traced array); use jax.numpy, and shapes that do not depend on values"
        ) from e
    except jax.errors.UnexpectedTracerError as e:
        raise ForeshardExportError(
            f"{what}: {where(e)} keeps a traced value beyond the call (in a global or an attribute); return it instead"
        ) from e
    except Exception as e:
        raise ForeshardExportError(f"{what}: {where(e)} failed while it was traced: {type(e).__name__}: {e}") from e


def where(error: BaseException) -> str:
    """The line of the user's code that raised: the last frame outside JAX, optax and this package."""
    here = str(Path(__file__).parent)
    libraries = tuple(str(Path(m.__file__).parent) for m in (jax, optax, np))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((here, "<", *libraries)):
            return f"{Path(frame.filename).name}:{frame.lineno} (`{frame.line}`)"
    return "it"
