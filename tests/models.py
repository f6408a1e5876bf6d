"""Small unmodified models that the end-to-end tests train: Hugging Face classes, and a GPT written by hand."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 96


def llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **changes}))


def mistral(**changes: object) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**{**_DECODER, "sliding_window": 8, **changes}))


def gpt2(**changes: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "loss_type": "ForCausalLM"}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **still, **changes}))


_DECODER: dict[str, object] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


class PlainGPT(nn.Module):
    """As people write it: learned positions, tied embeddings, [S, B, E] inside, labels shifted by slicing the logits."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, positions: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        S = input_ids.shape[1]
        x = self.tokens(input_ids) + self.positions.weight[:S]
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).transpose(0, 1)
        if labels is None:
            return None, logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)), logits


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP on [S, B, E]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        S, B, E = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(S, B, self.heads, E // self.heads).permute(1, 2, 0, 3) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / math.sqrt(E // self.heads))
        x = x + self.out(attended.permute(2, 0, 1, 3).reshape(S, B, E))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


def plain(**changes: object) -> nn.Module:
    return PlainGPT(**changes)  # type: ignore[arg-type]


MODELS = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "plain": plain}


def make(name: str, **changes: object) -> nn.Module:
    """The same model on every rank and on one device."""
    torch.manual_seed(0)
    return MODELS[name](**changes).train()


def batch(name: str, *, batch_size: int, length: int, ignored_until: int = 0) -> dict[str, object]:
    """Ids and labels; the labels of the first `ignored_until` positions do not count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)
    labels = ids.clone()
    labels[:, :ignored_until] = -100
    kwargs: dict[str, object] = {"input_ids": ids, "labels": labels}
    return kwargs if name == "plain" else {**kwargs, "use_cache": False}


def loss_and_logits(output: object) -> tuple[Tensor, Tensor]:
    return (output[0], output[1]) if isinstance(output, tuple) else (output.loss, output.logits)  # type: ignore[attr-defined]
