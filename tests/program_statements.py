"""The statements that random programs are made of: one table, in the text of Python.

A statement reads variables by the letters in its braces and makes one of the kind that is named:

    x, y  rows [B, S, W]     k  other rows [B, L, W]     i  integers [B, S]     m  booleans [B, S]
    c     a vector per batch element [B, W]              s  a number            n  a small integer of the statement itself

`{o}` is the variable that it makes. What writes into something that exists before is not repeated (`checkpoint` runs twice).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["x", "k", "i", "m", "c", "s", ""]
W = 8


@dataclass(frozen=True, slots=True)
class Statement:
    """One row of the table."""

    text: str
    makes: Kind = "x"
    repeats: bool = True

    @property
    def reads(self) -> list[str]:
        """The letters of the variables it reads, in order; y is another x."""
        return list(dict.fromkeys(letter for letter in re.findall(r"\{(\w)\}", self.text) if letter not in "on"))


def _writes(text: str, makes: Kind = "") -> Statement:
    return Statement(text, makes, repeats=False)


def _attention(call: str, rows: str = "{x}", keys: str = "{x}", heads: str = "2", kv_heads: str = "2") -> Statement:
    """`call` is given q, k and v as [B, H, S, D]."""
    return Statement(
        f"q = self.q({rows}).unflatten(-1, ({heads}, -1)).transpose(1, 2)\n"
        f"k = self.k{kv_heads if kv_heads != heads else ''}({keys}).unflatten(-1, ({kv_heads}, -1)).transpose(1, 2)\n"
        f"v = self.v{kv_heads if kv_heads != heads else ''}({keys}).unflatten(-1, ({kv_heads}, -1)).transpose(1, 2)\n"
        f"{{o}} = {rows} + self.out(({call}).transpose(1, 2).flatten(2))"
    )


SDPA = "F.scaled_dot_product_attention(q, k, v, "
POSITIONS = "torch.arange({x}.shape[1])"

ATTENTIONS: dict[str, Statement] = {
    "causal attention": _attention(SDPA + "is_causal=True)"),
    "attention to everything": _attention(SDPA + "scale=0.5)"),
    "grouped-query attention": _attention(SDPA + "is_causal=True, enable_gqa=True)", heads="4", kv_heads="1"),
    "padded attention": _attention(SDPA + "attn_mask={m}[:, None, None, :])"),
    "causal and padded attention": _attention(
        SDPA + f"attn_mask=({POSITIONS}[:, None] >= {POSITIONS}) & ({{m}}[:, None, None, :] | ({POSITIONS} == 0)))"
    ),
    "windowed attention": _attention(
        SDPA + f"attn_mask=({POSITIONS}[:, None] >= {POSITIONS}) & ({POSITIONS}[:, None] - {POSITIONS} <= 1 + {{n}}))"
    ),
    "attention to documents": _attention(SDPA + "attn_mask=({i} // 4)[:, None, :, None] == ({i} // 4)[:, None, None, :])"),
    "cross-attention": _attention(SDPA + "scale=0.7)", keys="{k}"),
    "cross-attention of the other rows": Statement(
        _attention(SDPA + "scale=0.7)", rows="{k}", keys="{x}").text, "k"
    ),
    "attention written out": _attention(
        f"torch.softmax((q @ k.transpose(-1, -2) / 2).masked_fill({POSITIONS} > {POSITIONS}[:, None], float('-inf')), -1) @ v"
    ),
    "attention with a bias by distance": _attention(
        f"torch.softmax(q @ k.transpose(-1, -2) - 0.1 * ({POSITIONS}[:, None] - {POSITIONS}).abs(), -1) @ v"
    ),
    "nn.MultiheadAttention": Statement("{o} = {x} + self.mha({x}, {x}, {x}, need_weights=False)[0]"),
    "rotary attention": _attention(
        "F.scaled_dot_product_attention(*(torch.cat([t[..., :2] * a.cos() - t[..., 2:] * a.sin(),"
        " t[..., 2:] * a.cos() + t[..., :2] * a.sin()], -1)"
        f" for a in [{POSITIONS}[:, None] / torch.tensor([1.0, 10.0])] for t in (q, k)), v, is_causal=True)"
    ),
}

POINTWISE: dict[str, Statement] = {
    "linear": Statement("{o} = self.lin({x})"),
    "second linear": Statement("{o} = {x} + F.gelu(self.lin2({x}))"),
    "norm": Statement("{o} = self.norm({x})"),
    "gate": Statement("{o} = {x} * torch.sigmoid({y})"),
    "sum": Statement("{o} = {x} + 0.5 * {y}"),
    "scale": Statement("{o} = {x} * self.scale"),
    "where": Statement("{o} = torch.where({x} > {y}, {x}, 0.1 * {x})"),
    "masked": Statement("{o} = {x} * {m}[:, :, None]"),
    "masked fill": Statement("{o} = {x}.masked_fill(~{m}[..., None], 0.25)"),
    "a vector for all rows": Statement("{o} = {x} + {c}[:, None]"),
    "a number for all rows": Statement("{o} = {x} + {s}"),
    "the buffer": Statement("{o} = {x} + self.ema"),
    "no dropout": Statement("{o} = F.dropout({x}, 0.0)"),
    "dropout of everything": Statement("{o} = {x} + F.dropout({y}, 1.0)"),
    "dropout of evaluation": Statement("{o} = F.dropout({x}, 0.5, training=False)"),
    "rows by id": Statement("{o} = {x} + self.tokens({i})"),
    "detached": Statement("{o} = {x} + torch.tanh({y}).detach()"),
    "by .data": Statement("{o} = {x} + self.lin2({y}.data)"),
    "one-hot": Statement("{o} = {x} + F.one_hot({i} % 8, 8).to({x}.dtype)"),
    "heads and back": Statement("{o} = {x}.unflatten(-1, (2, -1)).transpose(1, 2).tanh().transpose(1, 2).flatten(2)"),
    "chunks": Statement("a, b = {x}.chunk(2, -1)\n{o} = torch.cat([b, a * 0.5], -1)"),
    "stack": Statement("{o} = torch.stack([{x}, {y}]).sum(0)"),
    "float and back": Statement("{o} = {x} + {y}.to(torch.float64).sin().to({x}.dtype)"),
    "a lookup of the table": Statement("{o} = {x} + self.table.weight[: {x}.shape[1]]"),
    "a set of names": Statement(
        "for name in sorted({{'lin', 'lin2', 'norm'}} & set(self.chosen)):\n"
        "    {x} = {x} + 0.1 * getattr(self, name)({x})\n"
        "{o} = {x}"
    ),
    "an unordered set": Statement("{o} = {x}\nfor name in {{'near', 'far'}}:\n    {o} = {o} + 0.1 * {x} * self.rates[name]"),
    "a dict of names": Statement("{o} = {x} + sum(rate * {x} for name, rate in self.rates.items() if name in {{'near', 'far'}})"),
    "a dict of tensors": Statement(
        "parts = {{'a': {x}, 'b': self.lin({y})}}\n"
        "parts['c'] = parts['a'] * parts['b']\n"
        "{o} = parts['a'] + 0.1 * parts['c']"
    ),
    "einsum": Statement("{o} = {x} + torch.einsum('bsd,de->bse', {x}, self.lin.weight)"),
}

ACROSS_ROWS: dict[str, Statement] = {
    "roll": Statement("{o} = {x} + {y}.roll({n}, 1)"),
    "roll back": Statement("{o} = {x} - {y}.roll(-1, 1)"),
    "reversed": Statement("{o} = {x} + {y}.flip(1)"),
    "cumulative sum": Statement("{o} = {x} + {y}.cumsum(1) / {x}.shape[1]"),
    "minus the mean": Statement("{o} = {x} - {x}.mean(1, keepdim=True)"),
    "minus the maximum": Statement("{o} = {x} - {x}.amax(1, keepdim=True)"),
    "first row": Statement("{o} = {x} + {y}[:, :1]"),
    "last row": Statement("{o} = {x} + {y}[:, -1:]"),
    "shifted": Statement("{o} = {x} + F.pad({y}[:, :-1], (0, 0, 1, 0))"),
    "rows joined": Statement("{o} = torch.cat([{x}[:, {n}:], {x}[:, :{n}]], 1)"),
    "rows permuted": Statement("{o} = {x}[:, torch.arange({x}.shape[1] - 1, -1, -1)]"),
    "rows gathered": Statement("{o} = {x} + {y}.gather(1, ({i} % {x}.shape[1])[..., None].expand(-1, -1, 8))"),
    "flattened": Statement("{o} = self.lin({x}.reshape(-1, 8)).view({x}.shape)"),
    "sequence first": Statement("{o} = self.norm({x}.transpose(0, 1)).transpose(0, 1)"),
    "channels first": Statement("{o} = self.conv({x}.transpose(1, 2)).transpose(1, 2)"),
    "unfold": Statement("{o} = {x} + F.pad({y}, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1)"),
    "linear attention": Statement("{o} = {x} + {x} @ torch.softmax({y}.transpose(1, 2) @ {x} / {x}.shape[1], -1)"),
    "sorted": Statement("{o} = {x} + 0.1 * {y}.sort(1).values"),
    "as strided windows": Statement(
        "b, s, d = {x}.shape\n"
        "c = F.pad({x}, (0, 0, 1, 1)).contiguous()\n"
        "{o} = c.as_strided((b, s, 3, d), (c.stride(0), d, d, 1)).sum(2)"
    ),
    "as strided as it lies": Statement("{o} = {x}.contiguous().as_strided({x}.shape, (8 * {x}.shape[1], 8, 1)) * 0.5"),
    "as strided flat": Statement("{o} = {x} + {y}.contiguous().as_strided(({x}.numel() // 2,), (2,)).mean()"),
    "as strided, transposed": Statement(
        "c = {x}.transpose(1, 2).contiguous()\n"
        "{o} = c.as_strided({x}.shape, (c.stride(0), 1, c.stride(1))) + 0.1 * {y}"
    ),
    "strides asked for": Statement("{o} = {x} * (1 + {y}.transpose(1, 2).stride(1)) / 2"),
    "contiguity asked for": Statement("t = {x}.transpose(1, 2)\n{o} = {x} * (0.5 if t.is_contiguous() else 1.5)"),
    "boolean index written": Statement("t = {x}.clone()\nt[{m}] = 0.5\n{o} = t + {x}"),
    "boolean index of a sum": Statement("{o} = {x} + {y}[{m}].sum(0) / 4"),
    "masked select": Statement("{o} = {x} + {y}.masked_select({m}[..., None]).mean()"),
    "pooled by the mask": Statement("{o} = ({x} * {m}[..., None]).sum(1) / {m}.sum(1, keepdim=True)", "c"),
    "mean": Statement("{o} = self.lin2({x}.mean(1))", "c"),
    "maximum": Statement("{o} = {x}.amax(1)", "c"),
    "the last rows": Statement("{o} = {x}[torch.arange({x}.shape[0]), {m}.sum(1) - 1]", "c"),
    "the first": Statement("{o} = torch.tanh({x}[:, 0])", "c"),
    "variance": Statement("{o} = {x}.var()", "s"),
    "loss": Statement("{o} = F.cross_entropy({x}[:, :-1].flatten(0, 1), {i}[:, 1:].flatten() % 8)", "s"),
    "masked loss": Statement("{o} = F.cross_entropy({x}.transpose(1, 2), ({i} % 8).masked_fill(~{m}, -100))", "s"),
    "norm of all": Statement("{o} = {x}.square().mean().add(0.1).sqrt()", "s"),
    "argmax": Statement("{o} = {x}.argmax(-1)", "i"),
    "positions": Statement("{o} = torch.arange({x}.shape[1]).expand({x}.shape[0], -1)", "i"),
    "integers shifted": Statement("{o} = ({i}.roll(1, 1) + {n}) % 16", "i"),
    "a mask of values": Statement("{o} = {m} & ({i} != 3) | ({i} == {i}[:, :1])", "m"),
    "other rows": Statement("{o} = self.norm({k}) + {c}[:, None]", "k"),
    "other rows rolled": Statement("{o} = {k} + self.lin({k}.roll(1, 1))", "k"),
    "rows of the others": Statement("{o} = {x} + {k}.mean(1, keepdim=True)"),
}

WRITES: dict[str, Statement] = {
    "written": _writes("{o} = self.lin({x})\n{o}.mul_(0.5)", "x"),
    "added to": _writes("{o} = {x} * 1\n{o} += {y}", "x"),
    "written in place as it is": _writes("{x}.add_(0.5)"),
    "scaled in place as it is": _writes("{x}.mul_(0.9)"),
    "activation in place": _writes("{o} = F.relu(self.lin({x}), inplace=True)", "x"),
    "dropout, then written": _writes("{o} = F.dropout({x}, 0.0)\n{o} += {y}", "x"),
    "dropout in place": _writes("{o} = F.dropout(self.lin({x}), 0.0, inplace=True)", "x"),
    "row written": _writes("{o} = self.lin2({x})\n{o}[:, {n} % 4] = 0.5", "x"),
    "every second row written": _writes("{o} = {x}.clone()\n{o}[:, ::2] += {c}[:, None]", "x"),
    "rows copied": _writes("{o} = torch.zeros_like({x})\n{o}[:, 1:] = {x}[:, :-1]", "x"),
    "channels written": _writes("{o} = {x}.clone()\n{o}[..., {n} % 8].mul_(2)", "x"),
    "masked fill in place": _writes("{o} = self.lin({x})\n{o}.masked_fill_(~{m}[..., None], 0.1)", "x"),
    "boolean rows written": _writes("{o} = {x} * 1\n{o}[{m}] = {o}[{m}] * 0.5", "x"),
    "a view read after a write": _writes("v = {x}.clone()\nw = v[:, 1:]\nv.mul_(0.5)\n{o} = {x} + w.mean(1, keepdim=True)", "x"),
    "a view written": _writes("{o} = self.lin({x})\n{o}.transpose(1, 2).mul_(0.5)", "x"),
    "a view of heads written": _writes("{o} = {x}.clone()\n{o}.view(*{x}.shape[:2], 2, 4)[:, :, 0].add_(1)", "x"),
    "a part written": _writes("{o} = {x}.clone()\na, b = {o}.chunk(2, -1)\na.mul_(b.detach())", "x"),
    "flat view written": _writes("{o} = self.lin({x}).contiguous()\n{o}.view(-1)[::3] = 0.2", "x"),
    "strided view written": _writes(
        "{o} = {x}.contiguous().clone()\n"
        "{o}.as_strided(({x}.shape[0], 8), ({x}.shape[1] * 8, 1)).add_(0.5)", "x"
    ),
    "index added": _writes("{o} = {x}.clone()\n{o}.index_add_(1, torch.tensor([0, 2]), {y}[:, :2])", "x"),
    "scattered": _writes("{o} = {x}.clone()\n{o}.scatter_add_(1, ({i} % {x}.shape[1])[..., None].expand(-1, -1, 8), {y})", "x"),
    "copied into": _writes("{o} = torch.empty_like({x})\n{o}.copy_({x} * 0.7)", "x"),
    "written without grad": _writes("{o} = self.lin({x})\nwith torch.no_grad():\n    {o}.mul_(2.0)", "x"),
    "written by .data": _writes("{o} = self.lin({x})\n{o}.data.clamp_(-0.3, 0.3)", "x"),
    "written behind detach": _writes("{o} = self.lin2({x})\n{o}.detach().mul_(0.5)", "x"),
    "row written without grad": _writes("{o} = self.lin({x})\nwith torch.no_grad():\n    {o}[:, 0] = 0.5", "x"),
    "view written without grad": _writes(
        "{o} = self.lin({x})\n"
        "v = {o}[:, 1:]\n"
        "with torch.no_grad():\n"
        "    {o}.add_(1)\n"
        "{o} = {o} + v.sum(1, keepdim=True) * 0.1", "x"
    ),
    "two writes without grad": _writes(
        "{o} = self.lin2({x})\n"
        "before = {o}.sum()\n"
        "with torch.no_grad():\n"
        "    {o}.mul_(2)\n"
        "    {o}.add_(0.1)\n"
        "{o} = {o} + before", "x"
    ),
    "set by .data": _writes("{o} = self.lin({x})\n{o}.data = {o}.data * 0.5", "x"),
    "detached in place": _writes("t = self.lin({x}) * 1\nt.detach_()\n{o} = {x} + t", "x"),
    "needs no gradient": _writes("t = {x}.detach().clone().requires_grad_(False)\n{o} = {x} * t", "x"),
    "hook": _writes("{o} = self.lin({x})\n{o}.register_hook(lambda g: g * 2)", "x"),
    "hook that clamps": _writes("{o} = {x} * 1.5\n{o}.register_hook(lambda g: g.clamp(-0.2, 0.2))", "x"),
    "hook on a sum over rows": _writes("{o} = self.lin2({x})\n{o}.register_hook(lambda g: g - g.mean(1, keepdim=True))", "x"),
    "hook, then written": _writes("{o} = self.lin({x})\n{o}.register_hook(lambda g: g * 0.5)\n{o}.mul_(2)", "x"),
    "weight clamped by .data": _writes("self.lin.weight.data.clamp_(-0.2, 0.2)"),
    "weight clamped without grad": _writes("with torch.no_grad():\n    self.lin2.weight.clamp_(-0.2, 0.2)"),
    "scale clamped": _writes("with torch.no_grad():\n    self.scale.clamp_(0.6, 1.2)\n{o} = {x} * self.scale", "x"),
    "scale read, written, read": _writes("t = {x} * self.scale\nself.scale.data.mul_(0.9)\n{o} = t + {x} * self.scale", "x"),
    "embedding of bounded norm": _writes("{o} = {x} + self.bounded({i})", "x"),
    "moving average": _writes("self.ema.mul_(0.9).add_({x}.detach().mean((0, 1)), alpha=0.1)"),
    "moving average without grad": _writes("with torch.no_grad():\n    self.ema.lerp_({x}.mean((0, 1)), 0.1)"),
    "moving average, then read": _writes("self.ema.copy_(0.9 * self.ema + 0.1 * {x}.detach().mean((0, 1)))\n{o} = {x} * self.ema", "x"),
    "buffer assigned": _writes("self.ema = 0.9 * self.ema + 0.1 * {x}.detach().amax((0, 1))"),
    "rows of a buffer written": _writes("self.history[: {x}.shape[1]] = {x}.detach().mean(0)"),
    "rows of a buffer read": _writes("{o} = {x} + self.history[: {x}.shape[1]]", "x"),
    "count": _writes("self.count += 1\n{o} = {x} / self.count", "x"),
    "count of rows": _writes("self.count.add_({m}.sum())"),
    "batch norm": _writes("{o} = {x} + self.bn({x}.transpose(1, 2)).transpose(1, 2)", "x"),
    "written vector": _writes("{o} = {c} * 2\n{o}[:, 0] = 0", "c"),
    "written number": _writes("{o} = {s} * 1\n{o} += {x}.mean()", "s"),
    "written other rows": _writes("{o} = self.lin({k})\n{o}[:, 1:] *= 0.5", "k"),
    "written integers": _writes("{o} = {i}.clone()\n{o}[:, 0] = {n}", "i"),
    "written mask": _writes("{o} = {m}.clone()\n{o}[:, {n} % 4] = True", "m"),
}

BREAKS: dict[str, Statement] = {
    "graph break": _writes("torch._dynamo.graph_break()"),
    "a value asked for": _writes("{o} = {x} * (0.5 if {y}.sum().item() > 0.01 else 0.6)", "x"),
    "a branch on data": _writes("if {y}.mean() > 0.01:\n    {o} = {x} + self.lin({x})\nelse:\n    {o} = {x} - self.lin2({x})", "x"),
    "a size asked for": _writes("n = int({m}.sum(1).min())\n{o} = {x} + {x}[:, :n].mean(1, keepdim=True)", "x"),
    "rows chosen by a mask": _writes("t = {x}[{m}]\n{o} = {x} + self.lin(t).mean(0)", "x"),
    "nonzero": _writes("at = {m}[0].nonzero().flatten()\n{o} = {x} + {x}[:, at].mean(1, keepdim=True)", "x"),
}

STATEMENTS: dict[str, Statement] = {**ATTENTIONS, **POINTWISE, **ACROSS_ROWS, **WRITES, **BREAKS}

REGIONS = ("no_grad", "checkpoint")
"""Statements that hold the few that follow."""
