from __future__ import annotations

import pytest
from threads import torch_threads


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models gain nothing from threads, and lose much where the machine is shared."""
    with torch_threads(1):
        yield
