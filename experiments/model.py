"""Decoder-only transformers in plain torch: in the style of Llama, and of GPT-2.

Pre-norm blocks of causal self-attention and a feed-forward layer. Llama has rotary positions, SwiGLU,
RMSNorm, no biases, and untied embeddings: its weight shapes are the ones the paper's tables are about.
GPT-2 has learned positions, GELU, LayerNorm, biases, and one embedding for input and output.

Shapes: B sequences, T tokens, W width, H heads, D = W / H.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Tables = tuple[Tensor, Tensor]


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


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What one layer is made of.

    Attributes:
        width: Size of the residual stream W.
        num_heads: Number of attention heads H.
        bias: Whether the linear layers have biases.
        dropout: Share of what is dropped of attention weights and of each residual.
        norm_epsilon: Added to the mean square, or the variance, inside a norm.
        is_llama: RMSNorm and SwiGLU, else LayerNorm and GELU.
    """

    width: int
    num_heads: int
    bias: bool
    dropout: float
    norm_epsilon: float
    is_llama: bool

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """A linear layer."""
        return nn.Linear(inputs, outputs, bias=self.bias)

    def norm(self) -> nn.Module:
        """A norm over the width."""
        if self.is_llama:
            return nn.RMSNorm(self.width, eps=self.norm_epsilon)
        return nn.LayerNorm(self.width, eps=self.norm_epsilon, bias=self.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention; with rotary position embedding where tables are given."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.dropout = shape.dropout
        self.query = shape.linear(shape.width, shape.width)
        self.key = shape.linear(shape.width, shape.width)
        self.value = shape.linear(shape.width, shape.width)
        self.output = shape.linear(shape.width, shape.width)

    def forward(self, x: Tensor, tables: Tables | None) -> Tensor:
        """Attend to the earlier positions: (B, T, W) to (B, T, W)."""

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], self.num_heads, -1).transpose(1, 2)

        query, key = heads(self.query(x)), heads(self.key(x))
        if tables is not None:
            query, key = rotate(query, *tables), rotate(key, *tables)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            heads(self.value(x)),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        hidden = feed_forward_width(shape.width)
        self.gate = shape.linear(shape.width, hidden)
        self.up = shape.linear(shape.width, hidden)
        self.down = shape.linear(hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer at every position: (B, T, W) to (B, T, W)."""
        output: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return output


class GELU(nn.Module):
    """down(gelu(up(x))), four times as wide inside."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.up = shape.linear(shape.width, 4 * shape.width)
        self.down = shape.linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer at every position: (B, T, W) to (B, T, W)."""
        output: Tensor = self.down(functional.gelu(self.up(x), approximate="tanh"))
        return output


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.attention_norm = shape.norm()
        self.attention = Attention(shape)
        self.feed_forward_norm = shape.norm()
        self.feed_forward = (SwiGLU if shape.is_llama else GELU)(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, tables: Tables | None) -> Tensor:
        """Attention and feed-forward, each with its residual: (B, T, W) to (B, T, W)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), tables))
        output: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return output


class Transformer(nn.Module):
    """Decoder-only transformer: token indices to next-token logits.

    Weights are drawn from N(0, init_std²), those that write into the residual stream from
    N(0, init_std² / (2 num_layers)), with torch's global generator; biases are zero.

    Args:
        shape: Of the blocks.
        vocab_size: Number of tokens in the vocabulary.
        num_layers: Number of blocks.
        max_sequence_length: Longest sequence that has positions.
        tie_embeddings: Whether the head's weight is the embedding's.
        activation_checkpointing: Compute each block's activations again in the backward pass
            instead of keeping them: a third more work, a fraction of the memory.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: If the width can't be divided into heads of an even size.
    """

    def __init__(
        self,
        shape: BlockShape,
        *,
        vocab_size: int,
        num_layers: int,
        max_sequence_length: int,
        tie_embeddings: bool,
        activation_checkpointing: bool,
        init_std: float,
    ) -> None:
        super().__init__()
        if shape.num_heads < 1 or shape.width % (2 * shape.num_heads) != 0:
            raise ValueError(
                f"model.width={shape.width} can't be split into model.num_heads={shape.num_heads} "
                "heads of an even size."
            )
        if not 0 <= shape.dropout < 1:
            raise ValueError(f"model.dropout={shape.dropout} must be in [0, 1).")
        if num_layers < 1:
            raise ValueError(f"model.num_layers={num_layers} must be at least 1.")
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(vocab_size, shape.width)
        if not shape.is_llama:
            self.position_embedding = nn.Embedding(max_sequence_length, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(num_layers))
        self.norm = shape.norm()
        self.head = nn.Linear(shape.width, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise(init_std, num_layers)

    def _initialise(self, std: float, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            if parameter.ndim < 2:
                continue  # the norms' scales stay at one
            writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            scale = std / math.sqrt(2 * num_layers) if writes_residual else std
            nn.init.normal_(parameter, std=scale)

    def _tables(self, length: int) -> Tables | None:
        """The tables of rotary positions, if there are any."""
        return None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) integer tensor, T at most ``max_sequence_length``.

        Returns:
            Logits of shape (B, T, vocab_size).
        """
        length = tokens.shape[-1]
        tables = self._tables(length)
        x = self.embedding(tokens)
        if tables is None:
            x = x + self.position_embedding(torch.arange(length, device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, tables, use_reentrant=False)
            else:
                x = block(x, tables)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Llama(Transformer):
    """A transformer in the style of Llama; the arguments are those of `Transformer`.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        num_layers: Number of blocks.
        width: Size of the residual stream W.
        num_heads: Number of attention heads H; ``width / num_heads`` must be an even integer.
        max_sequence_length: Longest sequence the position tables cover.
        rope_theta: Base of the rotary embedding.
        norm_epsilon: Added to the mean square inside RMSNorm.
        init_std: Standard deviation of the initial weights.
        bias: Whether the linear layers have biases.
        dropout: Share that is dropped.
        tie_embeddings: Whether the head's weight is the embedding's.
        activation_checkpointing: See `Transformer`.

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
        bias: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            BlockShape(
                width=width,
                num_heads=num_heads,
                bias=bias,
                dropout=dropout,
                norm_epsilon=norm_epsilon,
                is_llama=True,
            ),
            vocab_size=vocab_size,
            num_layers=num_layers,
            max_sequence_length=max_sequence_length,
            tie_embeddings=tie_embeddings,
            activation_checkpointing=activation_checkpointing,
            init_std=init_std,
        )
        cos, sin = rotary_tables(max_sequence_length, width // num_heads, rope_theta)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def _tables(self, length: int) -> Tables:
        return self.rotary_cos[:length], self.rotary_sin[:length]


class GPT2(Transformer):
    """A transformer in the style of GPT-2; the arguments are those of `Llama`, without rotary positions."""

    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int,
        width: int,
        num_heads: int,
        max_sequence_length: int,
        norm_epsilon: float = 1e-5,
        init_std: float = 0.02,
        bias: bool = True,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            BlockShape(
                width=width,
                num_heads=num_heads,
                bias=bias,
                dropout=dropout,
                norm_epsilon=norm_epsilon,
                is_llama=False,
            ),
            vocab_size=vocab_size,
            num_layers=num_layers,
            max_sequence_length=max_sequence_length,
            tie_embeddings=tie_embeddings,
            activation_checkpointing=activation_checkpointing,
            init_std=init_std,
        )


def flops_per_token(model: nn.Module, length: int) -> float:
    """Floating-point operations of a token's forward and backward pass.

        6·(scalars of the matrices that multiply) + 12·layers·W·T

    Args:
        model: Any; the second part, of attention, is known of a `Transformer` only.
        length: Tokens of a sequence T.

    Returns:
        The number, as it is counted for the share of peak (arXiv 2204.02311, appendix B): no
        activation is counted as computed twice, and attention is counted as if not causal.
    """
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    lookups -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    multiply = [p for p in model.parameters() if p.ndim > 1 and id(p) not in lookups]
    attention = 0
    if isinstance(model, Transformer):
        attention = 12 * len(model.blocks) * model.embedding.embedding_dim * length
    return 6.0 * sum(p.numel() for p in multiply) + attention


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars of a model.

    Args:
        model: Any module; a parameter used twice counts once.

    Returns:
        The count.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
