"""Criteria with a running float32 statistic per layer: noted before a step, counted once the step succeeded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks.rules import DICT, TEXT, mapping, number, require
from ..checks.states import by_layer, require_state, tensor
from .criterion import Criterion


class StatisticCriterion(Criterion):
    """A criterion with one running statistic per layer, on the layer's device.

    Scores are magnitudes as long as a layer has no statistic, or one of zeros alone: :meth:`missing` tells. Noted
    values take as much memory as the statistic, from the start of an optimizer step to its end.
    """

    _running: dict[str, Tensor]
    _noted: dict[str, Tensor]
    _found: set[str]  # layers with a statistic, so that nobody asks the device again

    def __post_init__(self) -> None:
        # no fields, so that descriptions and comparisons see the configuration alone
        object.__setattr__(self, "_running", {})
        object.__setattr__(self, "_noted", {})
        object.__setattr__(self, "_found", set())

    def count_(self, running: Tensor, noted: Tensor) -> None:
        """Add a step's noted value to the running statistic, in place."""
        raise NotImplementedError

    def scores_from(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """Return ``[O, I]`` scores from a statistic on the weight's device."""
        return statistic

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        """Return the scores of the running statistic, or ``|weight|`` before there is one."""
        magnitude = weight.detach().abs()
        if layer not in self._running:
            return magnitude
        statistic = self._running[layer].to(weight.device)
        scores = self.scores_from(weight.detach(), statistic)
        return torch.where(statistic.any(), scores, magnitude.to(scores.dtype))

    def missing(self, layers: Iterable[str]) -> list[str]:
        """Return the layers without a statistic, or with one of zeros alone."""
        layers = list(layers)
        new = [layer for layer in layers if layer in self._running and layer not in self._found]
        if new:
            flags = torch.stack([self._running[layer].any().cpu() for layer in new]).tolist()
            self._found.update(layer for layer, flag in zip(new, flags, strict=True) if flag)
        return [layer for layer in layers if layer not in self._found]

    @torch.no_grad()
    def observe_step(self) -> None:
        """Count what was noted: the step succeeded."""
        for layer, noted in self._noted.items():
            running = self._running.get(layer)
            # a loaded statistic is on the CPU, and a model may move
            running = torch.zeros_like(noted) if running is None else running.to(noted.device)
            self.count_(running, noted)
            self._running[layer] = running
        self._noted.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the statistics, and of what is noted between the steps of several optimizers."""
        return {
            "criterion": self.name,
            "running": {layer: value.cpu().clone() for layer, value in self._running.items()},
            "noted": {layer: value.cpu().clone() for layer, value in self._noted.items()},
        }

    def check_state_dict(self, state: Any, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """Raise ``ValueError`` if the statistics are damaged or of other layers; changes nothing."""
        require_state("criterion", state, DICT)
        if state.get("criterion") != self.name:
            return
        rules = {layer: tensor(torch.float32, self._statistic_shape(*size)) for layer, size in sizes.items()}
        rule = mapping({"criterion": TEXT, "running": by_layer(rules), "noted": by_layer(rules)})
        require_state("criterion", state, rule)

    def _statistic_shape(self, rows: int, columns: int, features: int) -> tuple[int, ...]:
        if "input" not in self.needs:
            return rows, columns
        return tuple(self.summarize_input(torch.zeros(1, features)).shape)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`check_state_dict` let pass; the state of another criterion leaves none."""
        is_own = state.get("criterion") == self.name
        parts: tuple[Mapping[str, Any], ...] = (state["running"], state["noted"]) if is_own else ({}, {})
        for mine, saved in zip((self._running, self._noted), parts, strict=True):
            self._found.clear()
            mine.clear()
            mine.update({layer: value.clone() for layer, value in saved.items()})


@dataclass(frozen=True)
class MovingAverage(StatisticCriterion):
    """A statistic that is an exponential moving average over successful steps, from zero.

    Args:
        beta: The share of the past.

    Raises:
        ValueError: If ``beta`` is not in [0, 1).
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require("beta", self.beta, number("at least 0 and below 1", lambda value: 0 <= value < 1))

    def count_(self, running: Tensor, noted: Tensor) -> None:
        """Replace the average by ``β·average + (1-β)·noted``."""
        running.mul_(self.beta).add_(noted, alpha=1 - self.beta)
