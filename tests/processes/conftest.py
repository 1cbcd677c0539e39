"""Pools of processes, started when the first test asks for one."""

from collections.abc import Iterator

import pytest

from tests.processes.pool import PRELOADED, Pool

PRELOADED.append("tests.processes.training")


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    started = {size: Pool(size) for size in (2, 4)}
    yield started
    for pool in started.values():
        pool.close()
