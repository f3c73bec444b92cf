"""What people's tools keep beside the weights, and what runs nothing, is no reason to refuse a file."""

import argparse
import array
import collections
import ipaddress
import logging
import os
import time
import zoneinfo
from http import HTTPStatus
from typing import Any, Optional

import numpy as np
import pytest
import torch

from segmenter.weights.read import read_state_dict


class lower_case:
    pass


BESIDE = {
    "a class in lower case": lower_case(),
    "types": {"int": int, "optional": Optional[int], "either": int | None, "list": list[int], "any": Any},  # noqa: UP045
    "exceptions": [ValueError("x"), FileNotFoundError(2, "x")],
    "ellipsis": [..., NotImplemented, range(3), slice(1)],
    "chain": collections.ChainMap({"a": 1}),
    "numbers": array.array("f", [1.0]),
    "masked": np.ma.array([1, 2], mask=[False, True]),
    "times": [time.gmtime(0), zoneinfo.ZoneInfo("UTC"), HTTPStatus.OK, ipaddress.ip_address("::1")],
    "logger": logging.getLogger("a"),
    "file": os.stat("/"),
    "counts": collections.defaultdict(int, a=1),
    "arguments": argparse.Namespace(a=1),
    "text of a class": torch.__version__,
    "keys": {((1, 2), (3, 4)): 0, tuple(range(20)): 1, frozenset({frozenset({1})}): 2, 2**70: 3},
}


@pytest.mark.parametrize("protocol", [1, 2, 3, 5])
@pytest.mark.parametrize("kept", BESIDE)
def test_what_runs_nothing_loads_beside_weights(tmp_path, kept, protocol):
    torch.save({"model": {"a": torch.ones(2)}, "kept": BESIDE[kept]}, tmp_path / "a.pth", pickle_protocol=protocol)
    state, extra = read_state_dict(tmp_path / "a.pth")
    assert torch.equal(state["a"], torch.ones(2)) and "kept" in extra


def test_values_of_keys_and_arguments(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, **BESIDE}, tmp_path / "a.pth", pickle_protocol=1)
    extra = read_state_dict(tmp_path / "a.pth")[1]
    assert extra["keys"] == BESIDE["keys"]
    assert extra["arguments"] == argparse.Namespace(a=1)
    assert extra["counts"] == {"a": 1}
