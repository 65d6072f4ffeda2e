"""What every test shares: one thread (the networks are tiny, the machine is shared) and a quiet Diffusers."""

from collections.abc import Iterator

import diffusers
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)
