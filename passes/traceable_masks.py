"""What Dynamo is told before it traces: `nn.TransformerEncoder` and `nn.TransformerDecoder` take a mask without a graph break.

Given a mask and no `is_causal`, they compare the mask to a causal one to find out whether a faster kernel would do. That looks at
values, so Dynamo ends its graph there, inside torch's own module, and every layer runs outside of any compiled graph. While it
traces, the answer is "not known to be causal": the mask itself is then applied, which is what it says in either case.
"""

import torch
from torch import Tensor
from torch.nn.modules import transformer


def let_masks_through() -> None:
    """Have Dynamo trace `_is_causal_hint` in place of the comparison; to be called once."""
    torch.compiler.substitute_in_graph(transformer._detect_is_causal_mask, skip_signature_check=True)(_is_causal_hint)


def _is_causal_hint(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
