"""``RunStatus``: what can be asked of a run at any time, after its end as well."""

from typing import Any

from torch import Tensor, nn

from ..layers.selection.report import SelectionReport
from ..layers.verification import VerificationReport, verify
from ..methods.method import Method
from ..methods.schedule import Timeline
from ..types import PhaseKind
from .ending import Ending
from .mask_metrics import mask_metrics
from .mask_state import MaskState
from .phases import Phases
from .timing import StepTimer


class RunStatus:
    """The clock, the phase, the layers and the metrics of a :class:`sparsetrain.SparseTraining`."""

    model: nn.Module
    method: Method
    masks: MaskState
    ending: Ending | None = None
    """What the model is; None until :meth:`sparsetrain.SparseTraining.finish`."""
    _phases: Phases
    _selection: SelectionReport
    _weight_count: int  # of all linear and convolutional layers
    _final: tuple[dict[str, float], dict[str, Any]] | None = None  # metrics and state

    @property
    def clock(self) -> int:
        """Optimizer steps taken."""
        return self._phases.run.clock

    @property
    def phase(self) -> PhaseKind:
        """The phase of the clock: dense, sparse or frozen."""
        return self._phases.run.phase

    @property
    def timeline(self) -> Timeline:
        """When phases begin, in steps."""
        return self._phases.run.timeline

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None if unknown."""
        return self._phases.run.total_steps

    @property
    def finished(self) -> bool:
        """Whether :meth:`sparsetrain.SparseTraining.finish` was called."""
        return self._final is not None

    @property
    def report(self) -> SelectionReport:
        """Every linear or convolutional layer: sparse, with products and how it is gathered, or dense with a reason."""
        dense = self.masks.dense or ()
        report = self._selection.with_dense(dense, f"kept dense by dense_budget={self.method.dense_budget:g}")
        return report if self.finished else report.with_products(self.masks.layers, self._phases.wires)

    @property
    def sparse_flops_share(self) -> float:
        """Share of the layers' GEMM FLOPs that can run sparse now, if all have as many tokens."""
        layers = self.masks.layers.values()
        active = sum(layer.weight.numel() for layer in layers if layer.is_masked and layer.has_sparse_products)
        products = self.masks.pattern.sparse_products + (self.method.weight_product == "mvue")
        return products * active / (3 * self._weight_count)

    @property
    def refreshed(self) -> bool:
        """Whether the last step ended with a mask search."""
        return self.last_refresh == self.clock

    @property
    def last_refresh(self) -> int:
        """The clock at the last mask search, in optimizer steps; -1 before the first."""
        return self._phases.last_refresh

    @property
    def timer(self) -> StepTimer | None:
        """What mask searches and packing run inside, for benchmarks; None, the default, for nothing."""
        return self._phases.timer

    @timer.setter
    def timer(self, timer: StepTimer | None) -> None:
        self._phases.timer = timer

    def verify(self, example: Any) -> VerificationReport:
        """Compare the model as it runs with the same model with plain masked weights, as :func:`sparsetrain.verify`."""
        return verify(self.model, example)

    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the low-rank adapters: layer name to down ``[r, I]`` and up ``[O, r]``; empty if there are none."""
        return {name: pair for modifier in self._phases.modifiers for name, pair in modifier.adapters().items()}

    def metrics(self, per_layer: bool = False) -> dict[str, float]:
        """Measure the masks and what they keep; where weights are sharded, every rank has to call this.

        Args:
            per_layer: Add ``layer/<name>/flip_rate``, ``layer/<name>/kept_fraction_at_refresh`` and
                ``layer/<name>/<field of PruneMetrics>``.

        Returns:
            Always: ``clock`` (steps), ``sparse_layers`` (whose mask is in force), ``sparse_flops_share`` (of the
            layers' GEMMs, if all have as many tokens), ``violations`` (must be 0), ``refresh_ms`` and ``repack_ms``
            (host time of the last search, and of packing after the last step), ``operand_bytes`` (packed weights on the
            device); ``decay`` (λ of the next step, 0 where nothing is pulled) and ``distillation`` (T²·KL on the last
            batch, nats) if there is one. Once a mask exists: the fields of :class:`PruneMetrics`;
            ``kept_fraction_at_refresh``, of every layer's master as the last search of its mask saw it, as frozen masks
            zero what they prune; ``flip_rate`` and ``virtual_flip_rate``, the fraction of entries that changed at the
            last refresh of a sparse or dense phase; ``flip_rate_ratio``, the first over the second; ``age_mean``
            (refreshes).
        """
        if self._final is not None:
            return {key: value for key, value in self._final[0].items() if per_layer or not key.startswith("layer/")}
        layers = self.masks.layers.values()
        values: dict[str, float | None] = {
            "clock": self.clock,
            "sparse_layers": sum(layer.is_masked for layer in layers),
            "sparse_flops_share": self.sparse_flops_share,
            "violations": 0,
            "refresh_ms": self.masks.refresh_ms,
            "repack_ms": self._phases.repack_ms,
            "operand_bytes": sum(layer.operands.bytes for layer in layers),
        }
        for modifier in self._phases.modifiers:
            values.update(modifier.metrics(self._phases.run))
        if self.masks.exists:
            values.update(mask_metrics(self.masks, per_layer))
        return {key: float(value) for key, value in values.items() if value is not None}
