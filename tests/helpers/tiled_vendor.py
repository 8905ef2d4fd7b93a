"""A stand-in for cuSPARSELt on newer GPUs: tiles with padding inside, no workspace, late refusals, faults."""

from typing import Any

import torch
from fake_cusparselt import FakeCuSparseLt, FakeDevices, FakeError, vector
from metadata_walks import WALKS
from torch import Tensor

from sparsetrain.kernels.metadata_order import Order

PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


class TiledCuSparseLt(FakeCuSparseLt):
    """Metadata in words; ``refuses`` and ``fault_every`` change at any time.

    Args:
        devices: As for the base.
        order: ``"cutlass"``: the order of CUTLASS on sm_90 for a K tile of 128, matrices padded to whole atoms; or
            ``"pitched"``: tiles of 32 rows × 64 columns whose lines of four words are five apart.
    """

    def __init__(self, devices: FakeDevices | None = None, order: str = "cutlass") -> None:
        super().__init__(devices, workspace=0)
        self.order = order
        self.refuses: set[int | None] = set()  # config_ids whose products fail, once they are launched
        self.fault_every = 0  # every nth call of compress or multiply fails; 0 for none
        self.launched = 0
        self.garbage = torch.Generator()

    def places(self, rows: int, columns: int) -> tuple[Tensor, int]:
        """Place of every word, row by row, and how many places there are."""
        words = columns // 16
        if self.order == "cutlass":
            walk = list(WALKS[Order.CUTLASS_SM90_4](rows, words))
        else:
            walk = [
                (top + row, left + word)  # the fifth word of a line belongs to nobody
                for top in range(0, rows, 32)
                for left in range(0, words, 4)
                for row in range(32)
                for word in (0, 1, 2, 3, words)
            ]
        place = {at: number for number, at in enumerate(walk)}
        return torch.tensor([place[row, word] for row in range(rows) for word in range(words)]), len(walk)

    def size(self, rows: int, columns: int) -> int:
        return rows * columns + 2 * self.places(rows, columns)[1]

    def write(self, dense: Tensor, address: int) -> None:
        self._launch(None)
        fours = dense.reshape(-1, 4)
        kept = fours != 0
        if bool((kept.sum(1) > 2).any()):
            raise FakeError("the matrix is not 2:4")
        first = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :2].sort(1).values
        nibbles = (first[:, 0] | first[:, 1] << 2).view(-1, 4)
        words = (nibbles << torch.tensor([0, 4, 8, 12])).sum(1)
        words = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
        places, count = self.places(*dense.shape)
        vector(address, dense.dtype, 2 * len(fours)).copy_(fours.gather(1, first).flatten())
        behind = vector(address + 4 * len(fours), torch.int16, count)
        behind.random_(-(2**15), 2**15, generator=self.garbage)  # what lies in padding is another thing every time
        behind[places] = words

    def read(self, address: int, matrix: dict[str, Any]) -> Tensor:
        rows, columns = matrix["rows"], matrix["cols"]
        places, count = self.places(rows, columns)
        values = vector(address, matrix["dtype"], rows * columns // 2).view(-1, 2)
        words = vector(address + rows * columns, torch.int16, count)[places].long() & 0xFFFF
        nibbles = (words[:, None] >> torch.tensor([0, 4, 8, 12]) & 15).flatten()
        quads = torch.zeros(len(nibbles), 4, dtype=matrix["dtype"])
        quads.scatter_(1, torch.stack([nibbles & 3, nibbles >> 2], 1), values)
        return quads.view(rows, columns)

    def do_matmul(self, handle: int, plan: int, *rest: int) -> None:
        config_id = self._get(plan, "plan").values.get("CONFIG_ID")
        if config_id in self.refuses:
            raise FakeError(f"algorithm {config_id} is not supported")
        self._launch(config_id)
        super().do_matmul(handle, plan, *rest)

    def _launch(self, config_id: int | None) -> None:
        self.launched += 1
        if self.fault_every and self.launched % self.fault_every == 0:
            raise FakeError("an illegal memory access was encountered")
