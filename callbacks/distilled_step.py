"""``DistilledStep``: a Lightning module's ``training_step`` whose loss has the teacher's part in it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor


class DistilledStep:
    """Hangs on the module in place of its ``training_step``, where every strategy looks for it by name.

    A copy of the module, or its pickle, has the plain method.

    Args:
        module: The module; it gets this object as an attribute.
        distilled: What every loss goes through: :meth:`sparsetrain.SparseTraining.distilled`.

    Example:
        >>> class Module(LightningModule):
        ...     def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        ...         return {"loss": batch.sum()}
        >>> module = Module()
        >>> step = DistilledStep(module, lambda loss: 2 * loss)
        >>> module.training_step(Tensor([1.0]))
        {'loss': tensor(2.)}
        >>> step.remove()
        >>> module.training_step(Tensor([1.0]))
        {'loss': tensor(1.)}
    """

    def __init__(self, module: LightningModule, distilled: Callable[[Tensor], Tensor]) -> None:
        self._module = module
        self._distilled = distilled
        self._own = vars(module).get("training_step")  # such as a compiled one
        self._step = module.training_step
        self.__wrapped__ = inspect.unwrap(self._step)  # Lightning reads its signature
        vars(module)["training_step"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step; its loss, a tensor or a mapping's ``"loss"``, goes through ``distilled``, None does not."""
        output = self._step(*args, **kwargs)
        if isinstance(output, Tensor):
            return self._distilled(output)
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": self._distilled(output["loss"])}
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "training_step")

    def remove(self) -> None:
        """Give the module's own step back, unless something else has replaced it since."""
        if vars(self._module).get("training_step") is not self:
            return
        del vars(self._module)["training_step"]
        if self._own is not None:
            vars(self._module)["training_step"] = self._own
