"""Threads that work ahead of the model; what a stream does with them is in test_stream.py."""

import contextlib
import threading
import time

import numpy as np
import pytest

from segmenter.inference import read_ahead
from segmenter.inference.read_ahead import Call, ReadAhead, behind


@pytest.fixture
def reader(request):
    with contextlib.closing(ReadAhead(getattr(request, "param", 2))) as threads:
        yield threads
    assert not [thread for thread in threading.enumerate() if thread.name == "segmenter-reader"]


def test_results_come_in_order_and_an_error_is_that_of_one_call(reader):
    def halved(n):
        if n % 2:
            raise ValueError(f"{n} is odd")
        return n // 2

    calls = [reader.put(Call(halved, n)) for n in range(5)]
    assert [reader.result(call) for call in calls[::2]] == [0, 1, 2]
    for call in calls[1::2]:
        with pytest.raises(ValueError, match=f"{call.source} is odd"):
            reader.result(call)


@pytest.mark.parametrize("reader", [1], indirect=True)
def test_the_call_that_is_waited_for_begins_although_what_is_held_is_too_much(reader, monkeypatch):
    monkeypatch.setattr(reader, "max_bytes", 10)
    begun = []

    def read(n):
        begun.append(n)
        return np.zeros(100, np.uint8), np.zeros(11, np.uint8)

    calls = [reader.put(Call(read, n)) for n in range(4)]
    reader.wait(calls[0])
    assert calls[0].nbytes == 111
    reader.wait(calls[2])  # past the one before it
    assert begun == [0, 2]
    assert reader.full
    reader.release(calls[0])
    reader.release(calls[2])
    assert not reader.full
    while not calls[1].done:  # nobody waits for it
        time.sleep(0.01)
    assert begun == [0, 2, 1]


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_items_are_given_out_behind_those_that_are_taken(n):
    taken = []

    def items():
        for i in range(5):
            taken.append(i)
            yield i

    ahead = [(i, len(taken)) for i in behind(items(), n)]
    assert ahead == [(i, min(i + n + 1, 5)) for i in range(5)]


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_what_taking_an_item_raises_comes_after_the_items_before_it(n):
    def items():
        yield from range(3)
        raise ValueError("the fourth")

    given = []
    with pytest.raises(ValueError, match="the fourth"):
        for item in behind(items(), n):
            given.append(item)
    assert given == [0, 1, 2]


def test_at_most_that_many_threads_are_started_and_closing_ends_them():
    reader = ReadAhead(3)
    for n in range(9):
        reader.put(Call(abs, n))
    threads = [thread for thread in threading.enumerate() if thread.name == "segmenter-reader"]
    assert len(threads) == 3
    reader.close()
    assert not any(thread.is_alive() for thread in threads)
    assert read_ahead.MAX_BYTES == 1 << 30
