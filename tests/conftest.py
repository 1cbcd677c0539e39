"""What every test starts from: one thread, a seed, and the device that MTLWRAP_TEST_DEVICE names."""

import pytest
import torch

from tests.common import DEVICE


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Single files are run at once, where they are: starting other processes takes longer, and hides the debugger."""
    return 0 if all(".py" in argument for argument in config.args) else None


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240229)


@pytest.fixture
def device() -> torch.device:
    return DEVICE
