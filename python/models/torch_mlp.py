"""A PyTorch MLP with dropout on the 8x8 digits: `x` float32 [rows, 64] in 0..1, `y` int32 [rows]."""

import jax
import jax.numpy as jnp
import optax
import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.GELU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.layers(x))


def loss(module, batch):
    logits = module(batch["x"])
    right = (logits.argmax(-1) == batch["y"]).float()
    return F.cross_entropy(logits, batch["y"]), {"accuracy": right.mean()}


def model(batch=64, width=64, microbatches=(16, 64)):
    torch.manual_seed(0)
    return dict(
        module=Mlp(width),
        loss=loss,
        optimizer=optax.adamw(1e-3),
        batch={
            "x": jax.ShapeDtypeStruct((batch, 64), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch,), jnp.int32),
        },
        microbatches=list(microbatches),
    )
