import pytest
from simulated_backend import SimulatedBackend

from sparsetrain.backends import BACKENDS


@pytest.fixture(params=[False, True], ids=["own order", "natural order"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    simulated = SimulatedBackend(native=request.param)
    monkeypatch.setitem(BACKENDS, "simulated", simulated)
    return simulated
