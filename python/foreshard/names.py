"""Pytree paths to flat names, and which optimizer slot belongs to which param."""

from typing import Any, Sequence

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from .errors import ForeshardExportError

Path = tuple[Any, ...]


def part(key: Any) -> str:
    match key:
        case DictKey(key=k):
            return str(k)
        case SequenceKey(idx=i):
            return str(i)
        case GetAttrKey(name=n):
            return n
        case FlattenedIndexKey(key=k):
            return str(k)
    return str(key)


def flat_name(path: Path) -> str:
    """`{"blocks": [{"wq": w}]}` names its leaf `blocks.0.wq`; a bare array is called `value`."""
    return ".".join(part(k) for k in path) or "value"


def flatten(tree: Any) -> tuple[list[Path], list[Any]]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [p for p, _ in pairs], [leaf for _, leaf in pairs]


def unique_names(what: str, paths: Sequence[Path], prefix: str = "", taken: Sequence[str] = ()) -> list[str]:
    seen = {n: "a param" for n in taken}
    names = []
    for path in paths:
        name = prefix + flat_name(path)
        if name in seen:
            raise ForeshardExportError(
                f"{what}: two leaves are both called {name!r} ({seen[name]} and {jax.tree_util.keystr(path)}); "
                "rename one of them (a dot inside a dict key counts like nesting)"
            )
        seen[name] = jax.tree_util.keystr(path)
        names.append(name)
    return names


def owners(slot_paths: Sequence[Path], slots: Sequence[Any], param_paths: Sequence[Path],
           params: Sequence[Any]) -> list[int | None]:
    """For each slot, the index of the param it belongs to; `None` for shared state such as a step count.

    A slot belongs to a param when it sits in a subtree of the optimizer's state that mirrors the params' tree
    or a part of it (`optax.masked` leaves holes): every leaf below the subtree's root has the path of a param.
    The largest such subtree counts. Shapes need not agree: Adafactor's factored moments have fewer axes.
    """
    by_path = {p: i for i, p in enumerate(param_paths)}
    if () in by_path:  # params are one bare array: no tree to mirror, its shape and type must tell
        p = params[0]
        return [0 if s.shape == p.shape and s.dtype == p.dtype else None for s in slots]

    def mirrors(root: Path) -> bool:
        n = len(root)
        return all(p[n:] in by_path for p in slot_paths if p[:n] == root)

    known: dict[Path, bool] = {}
    found: list[int | None] = []
    for path in slot_paths:
        owner = None
        for n in range(len(path)):
            if path[n:] not in by_path:
                continue
            root = path[:n]
            if root not in known:
                known[root] = mirrors(root)
            if known[root]:
                owner = by_path[path[n:]]
                break
        found.append(owner)
    return found
