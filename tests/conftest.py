import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from vision import make_importable

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # must be set before anything imports Triton; tests of compiled kernels use processes of their own
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # as ranks have, with which tests compare: another number adds up in another order
make_importable()


RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")


def pytest_configure(config: pytest.Config) -> None:
    # naming this class in pyproject.toml would import Lightning, and so Triton, before the line above
    config.addinivalue_line("filterwarnings", "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold names of folders, too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN or the largest integer; on a CPU nothing else changes by it."""
    if torch.cuda.is_available():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    """Take down what Lightning's data-parallel strategies leave behind in the process and its environment."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def kernel_device() -> str:
    """Where kernels run: a GPU, or Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
