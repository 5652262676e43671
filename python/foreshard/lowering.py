"""A Python function to the bytes a bundle holds: HLO and portable StableHLO."""

import contextlib
import re
from typing import Any, Callable, Iterator

import jax
import jax.export

from .errors import ForeshardExportError

# The only custom calls that XLA itself implements everywhere; all others live in JAX's own runtime (LAPACK, ...).
KNOWN_CUSTOM_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "TopK"}


@contextlib.contextmanager
def without_source_locations() -> Iterator[None]:
    """Keeps machine paths and line numbers out of the modules, so that the same model gives the same bytes.

    The op names (`jit(grad)/jvp(block0)/dot_general`) stay: they carry `jax.named_scope`.
    """
    wanted = {"jax_include_full_tracebacks_in_locations": True, "jax_traceback_in_locations_limit": 0}
    before = {k: jax.config.values[k] for k in wanted}
    for k, v in wanted.items():
        jax.config.update(k, v)
    try:
        yield
    finally:
        for k, v in before.items():
            jax.config.update(k, v)


def lower(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bytes, bytes]:
    """`HloModuleProto` and serialised `jax.export` artifact of `function`, which must have a stable `__name__`.

    Every argument stays a parameter, used or not. Lowered for CPU, whose module other devices run too.
    """
    with without_source_locations():
        jitted = jax.jit(function, keep_unused=True)
        hlo = jitted.trace(*args).lower(lowering_platforms=("cpu",)).compiler_ir("hlo")
        check_custom_calls(function.__name__, hlo.as_hlo_text())
        leaves, tree = jax.tree.flatten(args)
        flat = lambda *leaves: tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))
        flat.__name__ = function.__name__
        portable = jax.export.export(jax.jit(flat, keep_unused=True), platforms=("cpu",))(*leaves)
        return hlo.as_serialized_hlo_module_proto(), bytes(portable.serialize())


def check_custom_calls(function: str, text: str) -> None:
    foreign = sorted(set(re.findall(r'custom_call_target="([^"]*)"', text)) - KNOWN_CUSTOM_CALLS)
    if foreign:
        raise ForeshardExportError(
            f"{function}: the model calls {', '.join(map(repr, foreign))}, which only JAX's own runtime can run "
            "(linear algebra, callbacks and Pallas kernels do this); write that part with jax.numpy and jax.lax"
        )
