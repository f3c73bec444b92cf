"""Random configurations of every kernel on the card; tests/random_cases.py runs single ones, and more of them."""

import pytest

from tests import random_cases
from tests.gpu.conftest import size

BATCH = size(500, 10)


@pytest.mark.parametrize("first", range(10_000, 10_000 + 4 * BATCH, BATCH))
def test_random_cases(first):
    found = random_cases.failures(first, BATCH)
    assert not found, f"{len(found)} of {BATCH} cases fail\n\n" + "\n\n".join(found)
