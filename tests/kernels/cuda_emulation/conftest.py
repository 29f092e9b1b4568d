from __future__ import annotations

import pytest
from emulation import Emulation


@pytest.fixture(scope="session")
def gpu() -> Emulation:
    """CUDA, emulated in this process."""
    return Emulation()
