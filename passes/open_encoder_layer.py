"""Open torch's fused encoder layers: what `nn.TransformerEncoderLayer` calls in eval mode under no_grad, as the operators it is made of.

    torch._transformer_encoder_layer_fwd(x, …)      →      linear, attention, linear, layer_norm, linear, relu, linear, layer_norm

Part of `open_regions`, on Dynamo's graph; `normalize` traces through the functions below. Legal because these are the fused
operators' own steps: a mask of any dtype hides where it is not 0, a row without a key is NaN, and gelu is the one of the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx


def open_encoder_layers(gm: fx.GraphModule) -> int:
    """Give every fused layer and fused self-attention its open form; returns how many there were."""
    opened = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _OPEN]
    for node in opened:
        node.target = _OPEN[node.target]
    return len(opened)


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor, mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """`torch._transformer_encoder_layer_fwd` of src [B, S, E]."""

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return self_attention(x, x, x, embed_dim, num_heads, *weights, mask, need_weights=False, mask_type=mask_type)[0]  # type: ignore

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        # The fused kernel of a GPU computes gelu by tanh.
        hidden = F.gelu(hidden, approximate="tanh" if x.is_cuda else "none") if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


def self_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True, average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`torch._native_multi_head_attention` of query, key and value [B, S, E]."""
    projected = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (num_head, -1)).transpose(1, 2) for x, w, b in projected)
    weights = None
    if mask is None and not need_weights:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = q / math.sqrt(q.shape[-1]) @ k.mT
        if mask is not None:
            hidden = mask[:, None, None] if mask_type == 1 else mask  # 1: [B, keys]; 0: [queries, keys]; 2: all four dims
            scores = scores.masked_fill(hidden.to(torch.bool), -math.inf)
        weights = torch.softmax(scores, -1)
        attended = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    return F.linear(attended.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights if need_weights else None


_OPEN = {
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch.ops.aten._transformer_encoder_layer_fwd.default: encoder_layer,
    torch._native_multi_head_attention: self_attention,
    torch.ops.aten._native_multi_head_attention.default: self_attention,
}
