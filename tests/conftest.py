"""Its presence puts this folder on the path, so that tests find ``launching``."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What engines leave in it (ranks, addresses) would make the next test's Accelerator wait for others."""
    with mock.patch.dict(os.environ):
        yield
