"""Copies to and from the device, on the CPU: nothing is copied twice or checked too early."""

import pytest
import torch

from segmenter.inference.transfers import Download, upload


def test_upload_to_where_it_is():
    x = torch.arange(4)
    assert upload(x, torch.device("cpu")) is x


def test_an_upload_to_the_host_waits(monkeypatch):
    """Pixels on a GPU for a model on the CPU: what is not waited for has not arrived."""
    device, asked = OnTheDevice([]), []
    device.to = lambda *to, **options: asked.append((*to, options.get("non_blocking", False)))
    upload(device, torch.device("cpu"))
    assert asked == [(torch.device("cpu"), False)]


def test_labels_are_fetched_and_scores_checked_then():
    labels = torch.zeros(1, 2, 3, dtype=torch.uint8)
    assert Download(labels, torch.tensor(3.0)).fetch() is labels
    for value in (float("nan"), float("inf")):
        download = Download(labels, torch.tensor(value))
        with pytest.raises(ValueError, match="NaN or infinite scores"):
            download.fetch()


class OnTheDevice:
    """A stand-in for a CUDA tensor: notes down in which order it is used."""

    is_cuda, device = True, torch.device("cuda:1")
    shape, dtype = torch.Size([2, 3]), torch.uint8

    def __init__(self, events, value=0.0):
        self.events, self.value = events, value

    def record_stream(self, stream):
        self.events.append(("kept for", stream.name))


class Stream:
    device_index = 1

    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append((self.name, "waits for", other.name))

    def record_event(self):
        self.events.append((self.name, "event"))
        return self

    def synchronize(self):
        self.events.append(("host waits for", self.name))

    def __enter__(self):
        self.events.append(("on", self.name))

    def __exit__(self, *_):
        pass


def test_a_download_waits_for_the_device_when_it_is_fetched(monkeypatch):
    events = []
    streams = {name: Stream(name, events) for name in ("compute", "download")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["compute"])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    module = "segmenter.inference.transfers"
    monkeypatch.setattr(f"{module}.dedicated_stream", lambda index, use: streams[use] if index == 1 else None)
    host = torch.tensor([1.0])
    monkeypatch.setattr(f"{module}._in_pinned_memory", lambda x: events.append("copy") or host)
    download = Download(OnTheDevice(events), OnTheDevice(events))
    assert events == [
        ("download", "waits for", "compute"),
        ("on", "download"),
        "copy",
        "copy",
        ("kept for", "download"),
        ("kept for", "download"),
        ("download", "event"),
    ]
    got = download.fetch()
    assert events[-1] == ("host waits for", "download")
    assert torch.equal(got, host) and got is not host, "memory of its own, which is not pinned"
