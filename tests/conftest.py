"""Shared fixtures. Nothing here needs a GPU."""

import pytest

from segmenter.model import Segmenter
from tests.tiny import tiny_model


@pytest.fixture
def model() -> Segmenter:
    return tiny_model()
