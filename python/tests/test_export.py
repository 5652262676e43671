"""The exporter: what it writes, and what it says about models it cannot export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import foreshard
from models import build, char_gpt, mlp_digits

PYTHON = Path(__file__).resolve().parents[1]
BUNDLES = PYTHON.parent / "bundles"


def small(**changes):
    arguments = dict(
        init=lambda key: {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)},
        loss=lambda p, batch, key: jnp.square(batch["x"] @ p["w"] + p["b"]).mean(),
        optimizer=optax.adam(1e-3),
        batch={"x": jax.ShapeDtypeStruct((8, 3), jnp.float32)},
        microbatches=[2, 8],
    )
    return {**arguments, **changes}


def manifest(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def test_names_params_and_gives_each_slot_its_param(tmp_path):
    m = manifest(foreshard.export(tmp_path / "a.bundle", **small()))
    assert [p["name"] for p in m["params"]] == ["b", "w"]
    owners = {s["name"]: s.get("param") for s in m["slots"]}
    assert sorted(o for o in owners.values() if o) == ["b", "b", "w", "w"]
    assert sum(o is None for o in owners.values()) == 1, "the step count belongs to nobody"
    assert [g["microbatch"] for g in m["grad"]] == [2, 8]


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory) -> Path:
    """All sample bundles, written by the command that wrote the committed ones, in a process of its own."""
    target = tmp_path_factory.mktemp("bundles")
    subprocess.run([sys.executable, "-m", "models.build", str(target)], cwd=PYTHON, check=True,
                   env={**os.environ, "PYTHONPATH": str(PYTHON)})  # fmt: skip
    return target


@pytest.mark.parametrize("name", build.MODELS)
def test_committed_bundles_are_byte_for_byte_those_of_the_sample_models(rebuilt, name):
    committed, made = BUNDLES / f"{name}.bundle", rebuilt / f"{name}.bundle"
    exporter = manifest(committed)["provenance"]["jax"]
    if exporter != jax.__version__:
        pytest.skip(f"made with jax {exporter}, this is {jax.__version__}")
    files = sorted(p.relative_to(made) for p in made.rglob("*.pb"))
    assert files and all((made / f).read_bytes() == (committed / f).read_bytes() for f in files)


def test_half_width_params_get_full_width_gradients(tmp_path):
    half = lambda key: {"w": jax.random.normal(key, (3, 2), jnp.bfloat16), "b": jnp.zeros(2, jnp.bfloat16)}
    m = manifest(foreshard.export(tmp_path / "h.bundle", **small(
        init=half, optimizer=foreshard.master_weights(optax.adam(1e-3)))))  # fmt: skip
    assert {p["dtype"] for p in m["params"]} == {"bfloat16"}
    assert {p["grad_dtype"] for p in m["params"]} == {"float32"}
    assert {s["dtype"] for s in m["slots"] if s.get("param")} == {"float32"}


def test_buckets_become_variants(tmp_path):
    model = char_gpt.model(layers=1, width=16, heads=2, ctx=8, batch=4, microbatches=(2,), dropout=0.0)
    model["init"] = lambda key: char_gpt.init(key, layers=1, width=16, ctx=8, vocab=256)
    m = manifest(foreshard.export(tmp_path / "b.bundle", **model))
    assert [g["shapes"]["tokens"] for g in m["grad"]] == [[2, 8]]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(loss=lambda p, b, k: (b["x"] @ p["w"]).mean(0)), "scalar"),
        (dict(loss=lambda p, b, k: (b["x"].sum() if b["x"].sum() > 0 else 0.0) * p["w"].sum()), "lax.cond"),
        (dict(batch={"x": jax.ShapeDtypeStruct((), jnp.float32)}), "axis"),
        (dict(init=lambda key: {"w": "weights"}), "w"),
        (dict(microbatches=[3]), "3"),
        (dict(optimizer=None), "optimizer"),
    ],
)
def test_says_what_is_wrong_and_writes_nothing(tmp_path, changes, says):
    with pytest.raises(foreshard.ForeshardExportError) as e:
        foreshard.export(tmp_path / "bad.bundle", **small(**changes))
    assert says in str(e.value)
    assert not (tmp_path / "bad.bundle").exists()


def test_an_mlp_exports_with_its_metrics(tmp_path):
    m = manifest(foreshard.export(tmp_path / "m.bundle", **mlp_digits.model(batch=8, microbatches=(8,))))
    assert [x["name"] for x in m["metrics"]] == ["accuracy"]
