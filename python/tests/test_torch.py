"""PyTorch models: what torchax traces computes what PyTorch computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import foreshard.torch
from foreshard import ForeshardExportError
from foreshard.torch import in_jax
from models import torch_mlp


def digits(rows=16):
    random = np.random.default_rng(0)
    return {
        "x": jnp.asarray(random.random((rows, 64), np.float32)),
        "y": jnp.asarray(random.integers(0, 10, rows), jnp.int32),
    }


def tensors(batch):
    return {"x": torch.tensor(np.asarray(batch["x"])), "y": torch.tensor(np.asarray(batch["y"])).long()}


def test_training_equals_pytorch_s_own():
    """Ten steps of AdamW: `torch.optim` and autograd against optax and `jax.grad`; both in float32."""
    model = torch_mlp.model(batch=16, microbatches=(16,))
    model["module"].eval()  # no dropout: the random numbers are of two libraries
    arguments = in_jax(**{k: model[k] for k in ("module", "loss", "optimizer", "batch")})
    params, batch = arguments["weights"], digits()
    slots = model["optimizer"].init(params)
    grad = jax.jit(jax.value_and_grad(lambda p: arguments["loss"](p, batch, jax.random.PRNGKey(0))[0]))
    peer = torch.optim.AdamW(model["module"].parameters(), lr=1e-3, weight_decay=1e-4)  # optax's default decay
    for _ in range(10):
        found, grads = grad(params)
        updates, slots = model["optimizer"].update(grads, slots, params)
        params = optax.apply_updates(params, updates)
        peer.zero_grad()
        expected, _ = model["loss"](model["module"], tensors(batch))
        expected.backward()
        peer.step()
        np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    for name, value in model["module"].named_parameters():
        np.testing.assert_allclose(params[name], value.detach().numpy(), atol=2e-5, err_msg=name)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.full((11,), 0.5))

    def forward(self, tokens):
        return self.head(self.embed(tokens)) + self.shift


def test_tied_weights_are_one_param_and_buffers_constants():
    module = Tied()
    loss = lambda m, batch: nn.functional.cross_entropy(m(batch["tokens"]), batch["tokens"])
    arguments = in_jax(module=module, loss=loss)
    assert list(arguments["weights"]) == ["embed.weight"]
    tokens = jnp.arange(8)
    grads = jax.grad(lambda p: arguments["loss"](p, {"tokens": tokens}, jax.random.PRNGKey(0)))(arguments["weights"])
    loss(module, {"tokens": torch.arange(8)}).backward()
    np.testing.assert_allclose(grads["embed.weight"], module.embed.weight.grad.numpy(), atol=1e-6)


def test_dropout_follows_the_step_s_key():
    model = torch_mlp.model()
    arguments = in_jax(**{k: model[k] for k in ("module", "loss")})
    value = lambda seed: float(arguments["loss"](arguments["weights"], digits(), jax.random.PRNGKey(seed))[0])
    assert value(1) == value(1) != value(2)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"module": 3}, "module: 3 is not a torch.nn.Module"),
        ({"module": nn.ReLU()}, "no parameter with requires_grad"),
        ({"module": nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))}, "keeps running statistics"),
        ({"loss": lambda module: 0}, "loss"),
        ({"loss": lambda module, batch: module(batch["x"])}, "scalar"),
    ],
)
def test_says_what_is_wrong_and_writes_nothing(tmp_path, changes, says):
    arguments = dict(
        module=nn.Linear(64, 10),
        loss=lambda module, batch: module(batch["x"]).square().mean(),
        optimizer=optax.sgd(0.1),
        batch={"x": jax.ShapeDtypeStruct((8, 64), jnp.float32)},
    )
    with pytest.raises(ForeshardExportError, match=says):
        foreshard.torch.export(tmp_path / "a.bundle", **{**arguments, **changes})
    assert list(tmp_path.iterdir()) == []
