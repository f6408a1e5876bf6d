"""The model zoo: small random configurations of unmodified model classes, a batch for each, and what is to be found in them.

Sizes are chosen so that no two of a model's dims are alike by chance: a tensor with two dims of a sequence's length, whole or
local, is a matrix of scores or a mask, and nothing else. Dropout is off. Parameters are moved away from the start of training,
where attention is uniform and gradients vanish.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
LENGTH = 29  # on two ranks 15 rows a rank, 16 under zigzag
OTHER_LENGTH = 37  # of a second sequence: 19 rows a rank, 20 under zigzag

CAUSAL = "k <= q"
WINDOW = "(k <= q) & (k > q - 8)"
SOFTCAP = ", score tanh(s/50)*50"
T5_BUCKETS = {  # 12 of them, the far ones logarithmic: both sides in the encoder, what lies behind in the decoder
    "encoder": "6*where(k > q, 1, 0) + where(Abs(k - q) < 3, Abs(k - q), Min(5, log(Abs(k - q)/3)/1.99243*3 + 3))",
    "decoder": "where(Min(0, k - q) > -6, -Min(0, k - q), Min(11, log(-Min(0, k - q)/6)/1.29928*6 + 6))",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: how it is made and called; the mask (and score) of each attention, in order; and the parameters whose gradient
    is zero but for rounding (a bias that shifts all scores of a row alike); and the operators that run on gathered values."""

    make: Callable[[str], nn.Module]
    batch: Callable[[], dict[str, Any]]
    masks: tuple[str, ...]
    attention: tuple[str, ...] = ("sdpa", "eager")
    sequence_sizes: frozenset[int] = frozenset({15, 16, LENGTH})
    zero_gradients: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()


def hugging_face(model: str, config: str, **settings: Any) -> Callable[[str], nn.Module]:
    """A class of transformers, by name, with the attention implementation that is asked for."""

    def make(attention: str) -> nn.Module:
        import transformers
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings, attn_implementation=attention))
        if made.loss_type is None:
            made.loss_type = "ForCausalLM"  # GPT-2's is not known by its name, and the warning of that would break the graph
        if settings.get("output_router_logits"):
            maybe_install_capturing_hooks(made.model)  # the first call would, and Dynamo cannot trace that
        return roughened(made)

    return make


def roughened(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.1)
    return model.train()


def decoder(name: str, config: str | None = None, **settings: Any) -> Callable[[str], nn.Module]:
    sizes = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 128}  # fmt: skip
    return hugging_face(f"{name}ForCausalLM", config or f"{name}Config", **{**_TOKENS, **sizes, **settings})


def encoder(model: str, config: str, **settings: Any) -> Callable[[str], nn.Module]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return hugging_face(model, config, **{**sizes, **settings})


_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_TWO_KINDS = {"num_hidden_layers": 2, "head_dim": 10, "sliding_window": 8, "query_pre_attn_scalar": 10,
              "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}


# Batches --------------------------------------------------------------------------------------------------------------


def ids(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def t5_score(side: str) -> str:
    return f", score s + {side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight({T5_BUCKETS[side]}, h)"


def language(use_cache: bool = False) -> Callable[[], dict[str, Any]]:
    """Ids and labels; a third of one row's labels does not count."""

    def batch() -> dict[str, Any]:
        labels = ids()
        labels[0, :9] = -100
        return {"input_ids": ids(), "labels": labels, "use_cache": use_cache}

    return batch


def masked_words() -> dict[str, Any]:
    labels = ids()
    labels[:, ::3] = -100
    attention_mask = torch.ones(2, LENGTH, dtype=torch.int64)
    attention_mask[1, -7:] = 0
    return {"input_ids": ids(), "labels": labels, "attention_mask": attention_mask}


def sentences() -> dict[str, Any]:
    return {"input_ids": ids(), "labels": torch.tensor([1, 0])}


def translation() -> dict[str, Any]:
    return {"input_ids": ids(OTHER_LENGTH, seed=3), "labels": ids(), "use_cache": False}


def images() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 28, 16, generator=generator), "labels": torch.tensor([1, 4])}


def speech() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(2, 10, 2 * LENGTH, generator=generator), "labels": torch.tensor([1, 0])}


def tagging(padded: bool = False) -> Callable[[], dict[str, Any]]:
    def batch() -> dict[str, Any]:
        padding = torch.zeros(2, LENGTH, dtype=torch.bool)
        padding[1, -7:] = True
        return {"input_ids": ids(), "labels": ids(seed=5), "padding": padding if padded else None}

    return batch


class Tagger(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a classification of every token."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.tokens, self.head, self.batch_first = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY), batch_first
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, labels: Tensor, padding: Tensor | None) -> Tensor:
        x = self.tokens(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=padding)
        x = x if self.batch_first else x.transpose(0, 1)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tagger(*, batch_first: bool) -> Callable[[str], nn.Module]:
    def make(attention: str) -> nn.Module:
        torch.manual_seed(0)
        return roughened(Tagger(batch_first=batch_first))

    return make


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def tensors_of(output: Any) -> dict[str, Tensor]:
    """What a call returns beside its loss: logits, and the keys and values of a cache."""
    if isinstance(output, Tensor):
        return {}
    found = {name: value for name, value in output.items() if isinstance(value, Tensor) and name != "loss"}
    for i, layer in enumerate(getattr(output.get("past_key_values"), "layers", ())):
        found |= {f"keys of layer {i}": layer.keys, f"values of layer {i}": layer.values}
    return found


# The zoo --------------------------------------------------------------------------------------------------------------

ZOO: dict[str, Entry] = {
    "llama": Entry(decoder("Llama"), language(), (CAUSAL,)),
    "llama with a cache": Entry(decoder("Llama"), language(use_cache=True), (CAUSAL,), ("sdpa",)),
    "qwen3": Entry(decoder("Qwen3", head_dim=10), language(), (CAUSAL,)),
    "mistral": Entry(decoder("Mistral", sliding_window=8), language(), (WINDOW,)),
    "gemma3": Entry(decoder("Gemma3", "Gemma3TextConfig", **_TWO_KINDS), language(), (WINDOW, CAUSAL)),
    "gemma2": Entry(decoder("Gemma2", **_TWO_KINDS), language(), (WINDOW + SOFTCAP, CAUSAL + SOFTCAP), ("eager",)),
    "bloom": Entry(
        hugging_face("BloomForCausalLM", "BloomConfig", **_TOKENS, hidden_size=32, n_layer=1, n_head=4, hidden_dropout=0.0,
                     attention_dropout=0.0),
        language(), (CAUSAL + ", score s + pow(0.25, Mod(h, 4) + 1)*k",), ("eager",)),
    "mpt": Entry(
        hugging_face("MptForCausalLM", "MptConfig", **_TOKENS, d_model=32, n_layers=1, n_heads=4, max_seq_len=64),
        language(), (CAUSAL + ", score s + (k - 28)*1/pow(2, (h + 1)*2)*1",), ("eager",)),
    "gpt2": Entry(
        hugging_face("GPT2LMHeadModel", "GPT2Config", **_TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=128, attn_pdrop=0.0,
                     embd_pdrop=0.0, resid_pdrop=0.0),
        language(), (CAUSAL,)),
    "gpt_neox": Entry(decoder("GPTNeoX", attention_dropout=0.0, hidden_dropout=0.0), language(), (CAUSAL,)),
    "opt": Entry(
        decoder("OPT", pad_token_id=1, ffn_dim=64, dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=40),
        language(), (CAUSAL,), zero_gradients=("k_proj.bias",)),
    "phi3": Entry(decoder("Phi3"), language(), (CAUSAL,)),
    "bert": Entry(
        encoder("BertForMaskedLM", "BertConfig", vocab_size=VOCABULARY, max_position_embeddings=128),
        masked_words, ("Ne(attention_mask(b, k), 0)",), zero_gradients=("key.bias",)),
    "bert that classifies": Entry(
        encoder("BertForSequenceClassification", "BertConfig", vocab_size=VOCABULARY, max_position_embeddings=128),
        sentences, ("all",), zero_gradients=("key.bias",)),
    "t5": Entry(
        hugging_face("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1,
                     num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, relative_attention_max_distance=22,
                     relative_attention_num_buckets=12),
        translation, ("all" + t5_score("encoder"), CAUSAL + t5_score("decoder"), "all"),
        sequence_sizes=frozenset({15, 16, LENGTH, 19, 20, OTHER_LENGTH})),
    "vit": Entry(
        encoder("ViTForImageClassification", "ViTConfig", image_size=(28, 16), patch_size=4, num_labels=5),
        images, ("all",), zero_gradients=("k_proj.bias",)),
    "whisper": Entry(
        hugging_face("WhisperForAudioClassification", "WhisperConfig", **_TOKENS, num_mel_bins=10, encoder_layers=1, d_model=32,
                     encoder_attention_heads=4, encoder_ffn_dim=64, max_source_positions=LENGTH, num_labels=2, classifier_proj_size=8,
                     decoder_start_token_id=0),
        speech, ("all",)),
    "deepseek_v3": Entry(
        decoder("DeepseekV3", num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4, kv_lora_rank=14, q_lora_rank=22,
                qk_rope_head_dim=4, v_head_dim=6, qk_nope_head_dim=8, n_group=2, topk_group=1, num_experts_per_tok=2,
                first_k_dense_replace=0),
        language(), (CAUSAL,)),
    "mixtral": Entry(decoder("Mixtral", **_EXPERTS), language(), (CAUSAL,)),
    "mixtral with batched experts and a router's loss": Entry(
        decoder("Mixtral", **_EXPERTS, experts_implementation="batched_mm", output_router_logits=True, router_aux_loss_coef=0.1),
        language(), (CAUSAL,), ("sdpa",), gathered=("aten.histc.default",)),  # which expert each token went to, a number each
    "gpt_oss": Entry(
        decoder("GptOss", **{**_TWO_KINDS, **_EXPERTS}, experts_implementation="grouped_mm"),
        language(), tuple(f"{mask}, sinks model.layers.{i}.self_attn.sinks" for i, mask in enumerate((WINDOW, CAUSAL))), ("eager",)),
    "nn.TransformerEncoder": Entry(tagger(batch_first=True), tagging(), ("all", "all"), ("",)),
    "nn.TransformerEncoder, sequence first, padded": Entry(
        tagger(batch_first=False), tagging(padded=True), ("Eq(padding(b, k), 0)",) * 2, ("",)),
}  # fmt: skip
