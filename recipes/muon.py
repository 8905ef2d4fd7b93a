"""Muon for the hidden matrices of a model and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` behind one step, one state and one learning rate.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate and one weight decay suit both.

    Args:
        matrices: What Muon updates: hidden weights with two dimensions.
        others: What AdamW updates, in groups or alone: embeddings, heads, norms, biases, kernels.
        lr: Learning rate of both.
        weight_decay: Of the matrices, and of the others where their groups say nothing else.
        betas: Of AdamW.
        momentum: Of Muon.

    Raises:
        ValueError: If there are no matrices, or one has not two dimensions.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> optimizer = MuonWithAdamW([layer.weight], [layer.bias], lr=1e-3)
        >>> layer(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> [sorted(state) for state in optimizer.state.values()]
        [['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step']]

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale: Liu et al.,
    "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
    ) -> None:
        matrices = list(matrices)
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._parts: tuple[Optimizer, ...] = (muon, AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the states of the whole."""
        first = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count


def muon_with_adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> MuonWithAdamW:
    """Return the optimizer of a language model: Muon for the matrices of its blocks, AdamW for the rest.

    Args:
        model: Embeddings (``nn.Embedding``) and the layers that share their weights or are called ``head`` are AdamW's.
        lr: Learning rate.
        weight_decay: Of matrices; vectors have none.
        betas: Of AdamW.

    Example:
        >>> from sparsetrain.recipes.gpt import GPT
        >>> optimizer = muon_with_adamw(GPT(width=32, depth=1, heads=2), lr=2e-3, weight_decay=0.1)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [5, 1, 3]
    """
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = list(model.named_parameters())
    hidden = [
        parameter
        for name, parameter in named
        if parameter.dim() == 2 and id(parameter) not in embedded and "head" not in name.split(".")
    ]
    chosen = {id(parameter) for parameter in hidden}
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    groups = [
        {"params": [parameter for parameter in rest if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return MuonWithAdamW(hidden, groups, lr, weight_decay, betas)
