"""Short runs with a teacher, and what its divergence is by definition."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.methods import dense_to_sparse_finetune
from sparsetrain.modifiers.distillation import Distillation

METHOD = dense_to_sparse_finetune(0.05, decay_ramp=4, freeze_at=8, refresh_every=2, distillation=0.67)
STEPS = 12


def teacher_of(training: st.SparseTraining) -> nn.Module:
    (found,) = (modifier for modifier in training._phases.modifiers if isinstance(modifier, Distillation))
    assert found.teacher is not None
    return found.teacher


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 16, generator=generator), torch.randint(16, (rows,), generator=generator)


def start(model: nn.Module, method: Any = METHOD, **options: Any) -> tuple[torch.optim.Optimizer, st.SparseTraining]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, st.SparseTraining(model, optimizer, method, STEPS, verbose=False, **options)


def run(
    model: nn.Module, optimizer: Any, training: st.SparseTraining, first: int = 0, last: int = STEPS,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        training.distilled(F.cross_entropy((forward or model)(x), y)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """From the definition, one position at a time."""
    total = torch.zeros((), dtype=torch.float64)
    rows = student.double().reshape(-1, student.shape[-1]), teacher.double().reshape(-1, student.shape[-1])
    for ours, theirs in zip(*rows, strict=True):
        q, p = (torch.exp(row / temperature) / torch.exp(row / temperature).sum() for row in (ours, theirs))
        total = total + (p * torch.log(p / q)).sum()
    return total * temperature**2 / len(rows[0])


class Noisy(nn.Module):
    """Dropout, statistics of batches, a tie, and logits in an object."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: types.SimpleNamespace(logits=logits)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.tied = self.norm.weight
        self.wrap = wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(self.second(self.drop(self.norm(self.first(x)))) * scale)
