"""``SavedRun``: what of a run is saved, and how it goes on from there."""

import copy
from collections.abc import Mapping
from typing import Any

from ..distributed.equal_codes import Groups
from .saved_state import received, resume_, state_of
from .sharded_state import in_fixed_layout
from .state_layouts import layouts_in
from .status import RunStatus
from .steps import Steps


class SavedRun(RunStatus):
    """The state of a :class:`sparsetrain.SparseTraining`."""

    _steps: Steps
    _everyone: Groups

    def _follow(self, state: Any) -> bool:
        """Go on by the method that a state was saved with, if that is one the run may have begun with."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers, strings and tensors; save it beside the model and the optimizer.

        Where weights are sharded, every rank has to call this, and what belongs to each weight is a DTensor that is
        spread like it.
        """
        return state_of(self._phases, self._steps.hooks) if self._final is None else copy.deepcopy(self._final[1])

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the state for ``torch.distributed.checkpoint``, to be saved, or to be loaded into.

        A flat dict that has the same tensors in every phase, DTensors where weights are sharded, and one entry for
        everything else; one that was saved in one process, or in any number of them, loads in any other. Where weights
        are sharded, every rank has to call this.

        Raises:
            RuntimeError: If the run is finished.

        Example:
            >>> import torch
            >>> from sparsetrain import SparseTraining
            >>> model = torch.nn.Linear(8, 8)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> training = SparseTraining(model, optimizer, "sr_ste", 100, verbose=False)
            >>> state = training.sharded_state_dict()  # dcp.save({"training": state}, checkpoint_id=folder)
            >>> sorted(state), state["codes."].shape  # of the model itself, which has no name
            (['codes.', 'plain'], torch.Size([2, 2]))
            >>> training.load_state_dict(state)  # what dcp.load({"training": state}, checkpoint_id=folder) has filled
        """
        if self._final is not None:
            raise RuntimeError("training is finished, so it has no sharded state: call sharded_state_dict() before.")
        layouts = layouts_in(self._phases)
        wanted = {path: layout for path, layout in layouts.items() if path[0] != "ages" or self.masks.ages}
        return in_fixed_layout(self.state_dict(), wanted)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: clock, phase, masks and statistics; weights and optimizers are the caller's.

        Pruned entries are put back into the weights if the state holds them, under ``"pruned_weights"``. Where weights
        are sharded, every rank has to call this; the state may have DTensors in any layout, or whole tensors.

        Args:
            state: What :meth:`state_dict` or :meth:`sharded_state_dict` returned.

        Raises:
            ValueError: If the state is damaged or of another model, on any rank; nothing is changed then.
        """
        if self.finished:
            raise ValueError("training is finished: pass the state to a new SparseTraining(..., state=...).")
        self._resume(state, stacklevel=4)

    def _resume(self, state: Mapping[str, Any], stacklevel: int) -> None:
        self._follow(state)
        found = received(state, self._phases, self._everyone, stacklevel + 1)
        resume_(self._phases, self._steps.hooks, found)
