"""A decoder-only transformer whose linear layers are all plain ``nn.Linear``."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.checks.suggestions import did_you_mean
from sparsetrain.kernels.gated_activation import KINDS, gated_activation

INIT_STD = 0.02
ROPE_BASE = 10_000.0

ActivationName = Literal["swiglu", "geglu", "relu2", "gelu"]
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "relu2": lambda up: F.relu(up).square(),
    "gelu": F.gelu,
}
"""What the MLP does to its hidden layer, in torch."""

GATED = ("swiglu", "geglu")
"""Which of them take a gate, the output of another linear layer."""


class GPT(nn.Module):
    """Pre-norm decoder-only transformer.

    Args:
        vocabulary: Number of tokens.
        width: Size of the residual stream, a multiple of ``2 * heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context: Longest sequence.
        positions: ``"rope"`` rotates queries and keys; ``"learned"`` adds an embedding.
        mlp: ``"swiglu"``, ``"geglu"``, ``"relu2"`` or ``"gelu"``.
        hidden: Size of the MLP's hidden layer; None is 4·width or, with a gate (SwiGLU, GEGLU), 8/3·width rounded up to
            a multiple of 32.
        tied: Share the head's weight with the token embedding.
        dropout: Share of attention weights and of each branch's output that is zeroed while training.
        kv_heads: Heads of keys and values, each for ``heads / kv_heads`` of the queries (grouped-query attention); None
            is one for every head.
        fused_activation: Compute the MLP's activation by the operator ``gated_activation``: one kernel, rounded once,
            that keeps its inputs alone for the backward. GELU without a gate has none.

    Raises:
        ValueError: If a size does not fit.

    Example:
        >>> model = GPT(width=32, depth=1, heads=2, context=8)
        >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 8, 256])
    """

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        context: int = 128,
        positions: Literal["rope", "learned"] = "rope",
        mlp: ActivationName = "swiglu",
        hidden: int | None = None,
        tied: bool = True,
        dropout: float = 0.0,
        fused_activation: bool = False,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(
                f"width is {width}: it must be a multiple of 2 * heads = {2 * heads}, so change width or heads."
            )
        if positions not in ("rope", "learned"):
            raise ValueError(f"positions is {positions!r}: it must be 'rope' or 'learned'.")
        if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise ValueError(f"kv_heads is {kv_heads}: it must divide heads = {heads}, or be None, so change it.")
        _check_activation(mlp, fused_activation)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: it must be at least 0 and below 1.")
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, mlp, positions == "rope", dropout, fused_activation, kv_heads)
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialise(depth)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, time, vocabulary]`` for token ids ``[batch, time]``."""
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(
                f"tokens have {time} positions: at most context = {self.context} are allowed, so cut them."
            )
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight[:time]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _initialise(self, depth: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=initial_std(name, depth))


def initial_std(name: str, depth: int) -> float:
    """Return the standard deviation that a matrix of a :class:`GPT` starts with.

    Args:
        name: Of the parameter.
        depth: Blocks of the model.

    Example:
        >>> initial_std("blocks.0.mlp.up.weight", depth=2), initial_std("blocks.0.mlp.down.weight", depth=2)
        (0.02, 0.01)
    """
    # residual branches add up over the depth, so their last layers start smaller
    residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
    return INIT_STD / math.sqrt(2 * depth) if residual else INIT_STD


def _check_activation(mlp: object, fused: bool) -> None:
    known, fusible = list(ACTIVATIONS), ", ".join(map(repr, KINDS))
    if mlp not in known:
        words = ", ".join(map(repr, known))
        raise ValueError(f"mlp is {mlp!r}: it must be one of {words}{did_you_mean(mlp, known)}.")
    if fused and mlp not in KINDS:
        raise ValueError(
            f"fused_activation is True, but mlp is {mlp!r}: it must be one of {fusible}, or leave fused_activation "
            "False."
        )


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream ``[batch, time, width]``."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None,
        activation: ActivationName,
        rotary: bool,
        dropout: float = 0.0,
        fused_activation: bool = False,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, rotary, dropout, kv_heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = MLP(width, hidden, activation, fused_activation)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        x = x + F.dropout(self.attention(self.attention_norm(x)), self.dropout, self.training)
        x = x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
        return x


class Attention(nn.Module):
    """Causal self-attention, of all heads alike or with keys and values that several queries share."""

    def __init__(self, width: int, heads: int, rotary: bool, dropout: float = 0.0, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.rotary = rotary
        self.dropout = dropout
        self.qkv = nn.Linear(width, width + 2 * self.kv_heads * (width // heads), bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions: ``[batch, time, width]`` to the same."""
        heads = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # [batch, heads, time, size]
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True,
            enable_gqa=self.kv_heads < self.heads,
        )  # fmt: skip
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return mixed


class MLP(nn.Module):
    """Feed-forward layer, with a gate or without one."""

    def __init__(self, width: int, hidden: int | None, activation: ActivationName, fused: bool = False) -> None:
        super().__init__()
        hidden = hidden or (32 * math.ceil(width * 8 / 3 / 32) if activation in GATED else 4 * width)
        self.activation, self.fused = activation, fused
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if activation in GATED else None
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every position: ``[..., width]`` to the same."""
        inner = [self.up(x)] if self.gate is None else [self.gate(x), self.up(x)]
        if self.fused:
            hidden = gated_activation(inner[0], inner[1] if self.gate is not None else None, self.activation)
        else:
            hidden = ACTIVATIONS[self.activation](*inner)
        y: Tensor = self.down(hidden)
        return y


def rotate(x: Tensor) -> Tensor:
    """Rotate pairs of features by angles that grow with the position (RoPE, arXiv 2104.09864).

    Args:
        x: ``[batch, heads, time, size]``, size even.
    """
    time, half = x.shape[-2], x.shape[-1] // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(time, device=x.device, dtype=torch.float32)[:, None] * frequency  # [time, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
