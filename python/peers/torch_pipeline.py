"""The char GPT as two stages of `torch.distributed.pipelining`, one process and one core each: a peer to measure against.

    python peers/torch_pipeline.py --steps 12

1F1B over gloo on loopback, AdamW, same sizes as `make bench`. The head's weight is not tied to the embedding, since
PyTorch's stages share no params; nothing is clipped. Both make PyTorch's step a little cheaper than the bundle's.
Prints `{"tokens_per_second": ...}` as its last line.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class First(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(args.vocab, args.width), nn.Embedding(args.ctx, args.width)
        self.blocks = nn.Sequential(*(Block(args.width, args.heads) for _ in range(args.layers // 2)))

    def forward(self, tokens):
        return self.blocks(self.wte(tokens) + self.wpe.weight)


class Last(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(args.width, args.heads) for _ in range(args.layers - args.layers // 2)))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, args.vocab, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.blocks(x)))


def worker(args):
    core = sorted(os.sched_getaffinity(0))[args.rank % len(os.sched_getaffinity(0))]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    torch.manual_seed(args.rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=args.rank, world_size=2)
    module = First(args) if args.rank == 0 else Last(args)
    stage = PipelineStage(module, args.rank, 2, torch.device("cpu"))
    loss = lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    schedule = Schedule1F1B(stage, n_microbatches=args.microbatches, loss_fn=loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(0)
    times = []
    for _ in range(args.steps):
        tokens = torch.randint(args.vocab, (args.batch, args.ctx + 1), generator=random)
        dist.barrier()
        began = time.perf_counter()
        if args.rank == 0:
            schedule.step(tokens[:, :-1].contiguous())
        else:
            schedule.step(target=tokens[:, 1:].contiguous())
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        times.append(time.perf_counter() - began)
    if args.rank == 1:
        print(json.dumps({"tokens_per_second": args.batch * args.ctx / statistics.median(times[2:])}), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(layers=6, width=256, heads=8, ctx=128, vocab=256, batch=8, microbatches=8, steps=12)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return worker(args)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--port", str(port), "--rank"]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        failed = [w.wait(600) for w in workers]
    finally:
        for w in workers:
            w.kill()
    sys.exit(max(failed))


if __name__ == "__main__":
    main()
