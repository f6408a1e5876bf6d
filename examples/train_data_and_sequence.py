"""A training script with copies of the data and ranks that share a sequence: packed documents, accumulation, clipping, validation, resume.

    torchrun --nproc-per-node 4 examples/train_data_and_sequence.py --sequence 2 --inner aot_eager

docs/port_a_script.md says which lines differ from the same script under DDP alone, which `--sequence 0` runs: without autoseq.
"""

import argparse
import contextlib
import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import autoseq

VOCABULARY, IGNORED = 64, -100


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        B, S, E = x.shape
        q, k, v = (t.view(B, S, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(B, S, E)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class PackedGPT(nn.Module):
    """Reads rows of several documents each: no token sees another document, and positions start anew in each."""

    def __init__(self, seq_len, width=32, heads=4, layers=2, dropout=0.1):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids, documents, positions, labels):
        place = torch.arange(ids.shape[1], device=ids.device)
        mask = (documents[:, None, :, None] == documents[:, None, None, :]) & (place[None, :] <= place[:, None])
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def packed(rows, seq_len, seed):
    """Rows of documents of random lengths: ids, the number of each token's document, its position there, and the next token."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, seq_len, generator=generator) < 0.1
    starts[:, 0] = True
    documents, place = starts.cumsum(1), torch.arange(seq_len).expand(rows, -1)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    ids = (documents * 7 + positions * 3 + torch.randint(0, 3, (rows, seq_len), generator=generator)) % VOCABULARY
    ends = torch.cat([starts[:, 1:], torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    return TensorDataset(ids, documents, positions, ids.roll(-1, 1).masked_fill(ends, IGNORED))


def arguments(given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequence", type=int, default=2, help="ranks that share a sequence; 0 trains without autoseq")
    parser.add_argument("--inner", default="inductor", help="aot_eager needs no C++ compiler")
    parser.add_argument("--optimizer", default="AdamW", choices=["AdamW", "SGD"])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="rows of a copy at a time")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written at the end, and read at the start where it exists")
    return parser.parse_args(given)


def validation_loss(model, rows, mesh, batch):
    """The mean over all tokens of all copies, each row once. The model is called without DDP, so copies may have more or fewer batches."""
    mine = range(mesh["data"].get_local_rank(), len(rows), mesh["data"].size())
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for each in DataLoader(rows, batch_size=batch, sampler=mine):
            count = (each[-1] != IGNORED).sum()
            total += torch.stack([model(*each).double() * count, count.double()])
    model.train()
    dist.all_reduce(total, group=mesh["data"].get_group())
    return (total[0] / total[1]).item()


def resume(checkpoint, states):
    """All ranks read the checkpoint that one has written. Returns the step to go on with."""
    if not checkpoint or not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint)
    for name, each in states.items():
        each.load_state_dict(saved[name])
    return saved["step"]


def train(given=None):
    """Trains; returns what was logged and the model."""
    args = arguments(given)
    mesh = autoseq.sequence_mesh(max(1, args.sequence))
    copy, copies = mesh["data"].get_local_rank(), mesh["data"].size()
    torch.manual_seed(args.seed)  # the same weights on all ranks
    model = PackedGPT(args.seq_len, dropout=args.dropout)
    optimizer = getattr(torch.optim, args.optimizer)(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first, log = resume(args.checkpoint, states), []
    if args.sequence:
        autoseq.parallelize(model, mesh=mesh["sequence"], inner=args.inner)
    replicated = DistributedDataParallel(model, process_group=mesh["data"].get_group())

    rows = packed(64, args.seq_len, seed=1)
    sampler = DistributedSampler(rows, num_replicas=copies, rank=copy, seed=args.seed)
    batches = itertools.islice(DataLoader(rows, batch_size=args.batch, sampler=sampler), first * args.accumulation, None)
    for step in range(first, args.steps):
        torch.manual_seed(args.seed + 1 + step * copies + copy)  # dropout: alike in a sequence, different between copies
        total = torch.zeros(())
        for part in range(args.accumulation):
            waits = part + 1 < args.accumulation  # for more batches, before gradients are averaged over the copies
            with replicated.no_sync() if waits else contextlib.nullcontext():
                loss = replicated(*next(batches)) / args.accumulation
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # gradients are whole on all ranks, so the norm is
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dist.all_reduce(total, group=mesh["data"].get_group())
        log.append((step, total.item() / copies, norm.item()))
        if dist.get_rank() == 0:
            print("step {}: loss {:.4f}, norm {:.4f}".format(*log[-1]), flush=True)
    valid = validation_loss(model, packed(7, args.seq_len, seed=2), mesh, args.batch)
    if dist.get_rank() == 0:
        print(f"validation loss {valid:.4f}", flush=True)
        if args.checkpoint:
            torch.save({"step": args.steps} | {name: each.state_dict() for name, each in states.items()}, args.checkpoint)
    return log, valid, model


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()
