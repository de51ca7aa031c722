"""Kernel tests run once for every implementation of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anomalygpt_edge import kernels

COMPILED = [name for name in kernels.available() if name != "reference"]


@pytest.fixture(params=kernels.available(), scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation in turn does the work."""
    with kernels.using(request.param):
        yield request.param


@pytest.fixture(params=COMPILED, scope="module")
def compiled(request: pytest.FixtureRequest) -> str:
    """Every compiled implementation in turn, to be compared with the reference."""
    return request.param
