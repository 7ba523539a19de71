"""A decoder-only transformer in the style of Llama, in plain torch.

Used by ``python -m experiments train`` and the demo. Pre-norm blocks of causal self-attention with
rotary position embedding and a SwiGLU feed-forward layer, RMSNorm, no biases, untied input and
output embeddings. Its weight shapes are the ones the paper's tables are about.

Shapes: B sequences, T tokens, W width, H heads, D = W / H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def feed_forward_width(width: int) -> int:
    """Width of the SwiGLU layer: ``256 * ceil((8/3 * width) / 256)``.

    Args:
        width: Model width.

    Returns:
        The smallest multiple of 256 that is at least 8/3 of the model width.
    """
    return 256 * math.ceil(8 * width / (3 * 256))


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding's angles, t * theta^(-2i/D).

    Args:
        length: Number of positions T.
        head_dim: D, even.
        theta: Base of the geometric progression of wave lengths.

    Returns:
        Two float32 tensors of shape (T, D/2).
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of each position by its angles.

    Args:
        x: (B, H, T, D).
        cos: (T, D/2).
        sin: (T, D/2).

    Returns:
        The rotated tensor, in the shape and dtype of ``x``.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary position embedding."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend to the earlier positions: (B, T, W) to (B, T, W)."""

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], self.num_heads, -1).transpose(1, 2)

        query = rotate(heads(self.query(x)), cos, sin)
        key = rotate(heads(self.key(x)), cos, sin)
        mixed = functional.scaled_dot_product_attention(
            query, key, heads(self.value(x)), is_causal=True
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = feed_forward_width(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer at every position: (B, T, W) to (B, T, W)."""
        output: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return output


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, num_heads: int, norm_epsilon: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_epsilon)
        self.attention = Attention(width, num_heads)
        self.feed_forward_norm = nn.RMSNorm(width, eps=norm_epsilon)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention and feed-forward, each with its residual: (B, T, W) to (B, T, W)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        output: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return output


class Llama(nn.Module):
    """Decoder-only transformer: token indices to next-token logits.

    Weights are drawn from N(0, init_std²), those that write into the residual stream from
    N(0, init_std² / (2 num_layers)), with torch's global generator.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        num_layers: Number of blocks.
        width: Size of the residual stream W.
        num_heads: Number of attention heads H; ``width / num_heads`` must be an even integer.
        max_sequence_length: Longest sequence the position tables cover.
        rope_theta: Base of the rotary embedding.
        norm_epsilon: Added to the mean square inside RMSNorm.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: If the width can't be divided into heads of an even size.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int,
        width: int,
        num_heads: int,
        max_sequence_length: int,
        rope_theta: float = 10_000.0,
        norm_epsilon: float = 1e-5,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % (2 * num_heads) != 0:
            raise ValueError(
                f"model.width={width} can't be split into model.num_heads={num_heads} heads "
                "of an even size."
            )
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, norm_epsilon) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(width, eps=norm_epsilon)
        self.head = nn.Linear(width, vocab_size, bias=False)
        cos, sin = rotary_tables(max_sequence_length, width // num_heads, rope_theta)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self._initialise(init_std, num_layers)

    def _initialise(self, std: float, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # the norms' scales stay at one
            writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            scale = std / math.sqrt(2 * num_layers) if writes_residual else std
            nn.init.normal_(parameter, std=scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) integer tensor, T at most ``max_sequence_length``.

        Returns:
            Logits of shape (B, T, vocab_size).
        """
        length = tokens.shape[-1]
        cos, sin = self.rotary_cos[:length], self.rotary_sin[:length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars of a model.

    Args:
        model: Any module; a parameter used twice counts once.

    Returns:
        The count.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
