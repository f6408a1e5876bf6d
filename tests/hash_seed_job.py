"""What one rank does whose Python hashes strings in an order of its own: trains models that walk a set of names. Prints a line of JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autoseq
from training_job import relative

NAMES = frozenset({"near", "far", "left", "right"})


class WalksNames(nn.Module):
    """Tables, parameters and outputs in the order of a set; at the end they are used by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in sorted(NAMES)})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.rand(8)) for name in sorted(NAMES)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        positions = torch.arange(x.shape[1])[:, None]
        tables = {name: torch.cos(positions / (len(name) ** 3)) for name in NAMES}
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q * tables["near"], k * tables["left"], v * tables["right"], is_causal=True)
        y = attended.transpose(1, 2).flatten(2) * tables["far"]
        return {name: torch.relu(self.layers[name](y)) * self.scales[name] for name in NAMES}


class Weights(WalksNames):
    """Only the weights' order differs: a program of the same operators, whose text does not tell one weight from another."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return {name: self.layers[name](y) + self.scales[name] for name in NAMES}


class Whole(WalksNames):
    """Nothing to split."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: torch.cos(self.layers[name](self.qkv(x)[..., :8])) * (len(name) + self.scales[name]) for name in NAMES}


class Writes(Weights):
    """In-place writes, which the order may not move a read across."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x.clone()
        before = y * 2
        y.mul_(3)
        y[:, :2] = 0
        return super().forward(y + before)


class Breaks(Weights):
    """Two parts, of which the second has no attention and takes in what the first made, in the order of the names."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        made = super().forward(x)
        torch._dynamo.graph_break()
        squares = {}
        for name in sorted(NAMES):
            squares[name] = made[name].square()
        return squares


class Gathers(Weights):
    """Two parts, between which Python takes in what the first made in the order of the set, where autoseq orders nothing."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        made = super().forward(x)
        torch._dynamo.graph_break()
        return {name: made[name].square() for name in NAMES}


class Draws(Weights):
    """A random draw for each name: each rank would draw for another one first."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        drawn = {name: F.dropout(x, 0.1 * len(name)) for name in NAMES}
        return super().forward(sum((drawn[name] for name in sorted(NAMES)), x))


class Alike(Weights):
    """Outputs that read alike, and differ by what is written between them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        made = super().forward(x)
        running, found = x.clone(), {}
        for name in NAMES:
            found[name] = running * 2
            running.add_(1)
        return {name: made[name] for name in NAMES} | {f"{name} found": found[name] for name in NAMES}


class Sums(Weights):
    """A sum in the order of the set: float addition is not associative."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        total = x
        for name in NAMES:
            total = total + self.scales[name]
        return super().forward(total)


MODELS = {
    "order": WalksNames, "weights": Weights, "whole": Whole, "writes": Writes, "breaks": Breaks,
    "gathers": Gathers, "draws": Draws, "sums": Sums, "alike": Alike,
}  # fmt: skip


def train(name: str, inner: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, 13, 8)
    oracle = copy.deepcopy(model)
    try:
        ours = torch.compile(model, backend="autoseq", options={"inner": inner})(x)
        theirs = oracle(x)
        outputs = max(relative(ours[each].detach() + 0, theirs[each].detach()) for each in sorted(NAMES))
        for each in (ours, theirs):
            sum(each[key].square().sum() for key in sorted(NAMES)).backward()  # type: ignore[union-attr]
    except autoseq.AutoSeqError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    pairs = zip(model.parameters(), oracle.parameters(), strict=True)
    return {"outputs": outputs, "gradients": max(relative(p.grad, q.grad) for p, q in pairs), "kind": type(ours["far"]).__name__}  # type: ignore[arg-type]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: train(name, "eager") for name in MODELS} | {"order, aot_eager": train("order", "aot_eager")}
    print(json.dumps({"names": list(NAMES), "found": found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
