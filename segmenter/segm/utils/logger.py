"""Meters and lines of progress."""

import datetime
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import segmenter.segm.utils.torch as ptu


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


class SmoothedValue:
    """A series of numbers: figures of the last `window_size` ones (median, avg, max, value) and of all (global_avg).

    fmt: how str() shows it, by these names.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        self.fmt = "{median:.4f} ({global_avg:.4f})" if fmt is None else fmt
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0

    def update(self, value: float, n: int = 1) -> None:
        """Adds the mean `value` of `n` samples."""
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self) -> None:
        """Sums `count` and `total` over all processes; the last values stay those of this one."""
        if is_dist_avail_and_initialized():
            sums = torch.tensor([self.count, self.total], dtype=torch.float64, device=ptu.device)
            dist.all_reduce(sums)
            self.count, self.total = int(sums[0]), sums[1].item()

    @property
    def median(self) -> float:
        return statistics.median_low(self.deque)

    @property
    def avg(self) -> float:
        return statistics.fmean(self.deque)

    @property
    def global_avg(self) -> float:
        return self.total / self.count

    @property
    def max(self) -> float:
        return max(self.deque)

    @property
    def value(self) -> float:
        return self.deque[-1]

    def __str__(self) -> str:
        return self.fmt.format(**{n: getattr(self, n) for n in ("median", "avg", "global_avg", "max", "value")})


class MetricLogger:
    """Meters by name: `update(loss=1.5)`, then `logger.loss.global_avg` or `logger.meters["loss"]`."""

    def __init__(self, delimiter: str = "\t"):
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, n: int = 1, **kwargs: Any) -> None:
        """Adds a number, or a tensor of one, to each meter named.

        Raises:
            TypeError: it is something else.
        """
        for name, value in kwargs.items():
            value = value.item() if isinstance(value, torch.Tensor) else value
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            self.meters[name].update(value, n)

    def __getattr__(self, attr: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if attr not in meters:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attr!r}")
        return meters[attr]

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def log_every(self, iterable: Any, print_freq: int, header: str | None = None) -> Iterator[Any]:
        """Passes items on and prints a line of all meters at every `print_freq`-th and the last of them."""
        n, began = len(iterable), time.monotonic()
        for i, item in enumerate(iterable):
            yield item
            if i % print_freq == 0 or i == n - 1:
                passed = time.monotonic() - began
                eta = datetime.timedelta(seconds=int(passed / (i + 1) * (n - 1 - i)))
                parts = [header or "", f"[{i:{len(str(n))}}/{n}]", f"eta: {eta}", str(self)]
                print(self.delimiter.join([*parts, f"time: {passed / (i + 1):.4f}"]), flush=True)
        passed = time.monotonic() - began
        print(f"{header or ''} Total time: {datetime.timedelta(seconds=int(passed))} ({passed / max(n, 1):.4f} s / it)")
