"""A model of two sequences, text and image tokens, as diffusion transformers have them: joint attention over both, end to end."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream(nn.Module):
    """What one kind of token has for itself: a projection to q, k, v, one back, and a feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))

    def go_on(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class JointBlock(nn.Module):
    """One attention over both sequences, laid end to end in either order."""

    def __init__(self, width: int, heads: int, image_first: bool) -> None:
        super().__init__()
        self.text, self.image, self.image_first = Stream(width, heads), Stream(width, heads), image_first

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.text.project(text), self.image.project(image), strict=True)
        q, k, v = (torch.cat((i, t) if self.image_first else (t, i), 2) for t, i in pairs)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        sizes = [image.shape[1], text.shape[1]] if self.image_first else [text.shape[1], image.shape[1]]
        first, second = attended.split(sizes, 1) if self.image_first else (attended[:, : sizes[0]], attended[:, sizes[0] :])
        t, i = (second, first) if self.image_first else (first, second)
        return self.text.go_on(text, t), self.image.go_on(image, i)


class Joint(nn.Module):
    """Blocks of joint attention, and a loss of the image tokens."""

    def __init__(self, image_first: bool, blocks: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(width, heads, image_first) for _ in range(blocks))
        self.head = nn.Linear(width, 6)

    def forward(self, text: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(text, image)
        return F.mse_loss(self.head(image), wanted) + text.square().mean()
