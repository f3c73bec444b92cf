"""Many pictures to labels: read in threads, batched by size, given out in the order they came in.

The look-ahead is a short queue of pictures. The next batch is always that of the first picture without labels, with the
pictures of its size that stand behind it: so a rare size never waits, and which pictures share a batch depends on sizes
and order alone, not on how fast anything was read.
"""

import contextlib
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from segmenter.errors import cause, printable
from segmenter.inference.images import ImageError, read_image
from segmenter.inference.segment import compute_dtype, segment_pixels, usual_batch_size

MAX_BYTES = 1 << 30  # of pictures that are read and wait; reading pauses above it
_CLOSING_SECONDS = 1.0
# What running out of memory is called where it is no torch.OutOfMemoryError: on the CPU, and outside torch's allocator
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)

OnError = str | Callable[[int, Any, ImageError], None]


class Result(NamedTuple):
    """What became of one picture; either `labels` or `error` is None.

    Attributes:
        index: position in the stream, from 0. source: what came in.
        pixels: (H, W, 3) uint8, or None if they were not to be kept. labels: (H, W), as of `segment_image`.
        error: why there are no labels; the message names the picture.
    """

    index: int
    source: Any
    pixels: np.ndarray | None
    labels: torch.Tensor | None
    error: ImageError | None


class PictureMemoryError(torch.OutOfMemoryError):
    """One window of one picture is too much for the memory. Attribute `source`: the picture."""

    def __init__(self, source: Any, message: str):
        super().__init__(message)
        self.source = source


def segment_stream(
    model: torch.nn.Module,
    images: Iterable[Any],
    *,
    batch_size: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window_size: int | None = None,
    window_stride: int | None = None,
    window_batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    workers: int | None = None,
    lookahead: int | None = None,
    on_error: OnError = "report",
    progress: bool | None = None,
) -> Iterator[torch.Tensor | None]:
    """Labels of many pictures, in their order: `for labels in segment_stream(model, paths):`.

    Args:
        model: a `Segmenter` in evaluation mode.
        images: whatever `segmenter.inference.images.read_image` takes, in a list or any other iterable, also an endless
            one. Paths are read in threads. Arrays, tensors and PIL images are copied as soon as they come, so a
            generator may fill the same buffer again.
        batch_size: pictures of one size to run together; by default 1 on a CPU, 8 elsewhere. After running out of
            memory it is halved for the rest of the stream, with a warning; for a single picture, window_batch_size is.
        scales, flip, window_size, window_stride, dtype: see `segmenter.inference.segment.segment_image`.
        window_batch_size: windows a forward call; by default batch_size, but at least 8 if not on a CPU.
        workers: threads that read; by default one a processor, at most 4.
        lookahead: pictures taken from `images` before the first of them is given out, at least batch_size. By default
            enough for four batches, and two a worker. For live pictures take 1, with batch_size=1.
        on_error: what to do about a picture that cannot be read or run. "report": warn, and give None in its place.
            "raise": raise the ImageError when its turn comes. A function: call it with (index, picture, ImageError),
            and give None.
        progress: a progress bar on stderr; None: if that is a terminal.
    Yields:
        labels (H, W) as of `segment_image`, a tensor of its own; None for a picture without labels.
    Raises:
        at once: TypeError, ValueError: arguments that make no sense. RuntimeError: training mode.
        in its turn: PictureMemoryError: one window is too much. What `images` raises, after the pictures before it.

    Memory beside that of `segment_image` for a batch: `lookahead` pictures of 3 bytes a pixel, and 1 to 4 for labels.
    Reading pauses while they hold more than MAX_BYTES (1 GiB), so they hold at most that and one picture a worker;
    batches are then made of what is there. Close the generator, or exhaust it, to end its threads.
    """
    if not (on_error in ("report", "raise") if isinstance(on_error, str) else callable(on_error)):
        raise ValueError(f'on_error must be "report", "raise" or a function, got {on_error!r}')
    stream = results(
        model,
        images,
        batch_size=batch_size,
        scales=scales,
        flip=flip,
        window_size=window_size,
        window_stride=window_stride,
        window_batch_size=window_batch_size,
        dtype=dtype,
        workers=workers,
        lookahead=lookahead,
        keep_pixels=False,
    )
    total = len(images) if isinstance(images, Sized) else None
    return _labels(stream, total, on_error, None if progress is None else not progress)


def _labels(
    stream: Iterator[Result], total: int | None, on_error: OnError, no_bar: bool | None
) -> Iterator[torch.Tensor | None]:
    bar = tqdm(total=total, unit="picture", disable=no_bar)  # None: no bar unless on a terminal
    with contextlib.closing(stream), bar:
        for result in stream:
            bar.update()
            if result.error is not None:
                if on_error == "raise":
                    raise result.error
                if on_error == "report":
                    warnings.warn(f"{result.error}; None is given for its labels", stacklevel=2)
                else:
                    on_error(result.index, result.source, result.error)
            labels = result.labels
            del result  # the consumer may take its time
            yield labels


def results(
    model: torch.nn.Module,
    images: Iterable[Any],
    *,
    batch_size: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window_size: int | None = None,
    window_stride: int | None = None,
    window_batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    workers: int | None = None,
    lookahead: int | None = None,
    keep_pixels: bool = True,
) -> Iterator[Result]:
    """As `segment_stream`, with all that is known of each picture; `keep_pixels`: the picture too."""
    if isinstance(images, str | os.PathLike | Image.Image):
        raise TypeError(f"expected many pictures, got one ({type(images).__name__}); use segment(), or give a list")
    if model.training:
        raise RuntimeError("the model is in training mode: dropout would make the labels random; call model.eval()")
    usual = usual_batch_size(next(model.parameters()).device)
    batch_size = usual if batch_size is None else batch_size
    window_batch_size = max(batch_size, usual) if window_batch_size is None else window_batch_size
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    lookahead = max(4 * batch_size, 2 * workers) if lookahead is None else lookahead
    counts = {"batch_size": batch_size, "window_batch_size": window_batch_size, "workers": workers}
    for name, value in {**counts, "lookahead": lookahead}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if lookahead < batch_size:
        raise ValueError(f"lookahead={lookahead} pictures can never fill a batch of {batch_size}")
    # each picture would be refused for these, one by one
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive and at least one, got {scales!r}")
    window = model.info.window_size if window_size is None else window_size
    if window < 1 or (window_stride is not None and not 1 <= window_stride <= window):
        raise ValueError(f"need 1 <= window_stride <= window_size, got {window_stride} and {window}")
    compute_dtype(model, dtype)
    options = {"scales": scales, "flip": flip, "window_size": window_size, "window_stride": window_stride}
    runner = _Runner(model, batch_size, window_batch_size, {**options, "dtype": dtype})
    return _results(iter(images), runner, _Reader(workers), lookahead, keep_pixels)


@dataclass(eq=False)
class _Slot:
    """A picture in the look-ahead. `nbytes` is what it counts for until it is given out."""

    index: int
    source: Any
    pixels: np.ndarray | None = None
    labels: torch.Tensor | None = None
    error: BaseException | None = None
    read: bool = False
    nbytes: int = 0

    @property
    def name(self) -> str:
        if isinstance(self.source, str | os.PathLike):
            with contextlib.suppress(Exception):  # a path need not know its name
                return os.fsdecode(self.source)
        return f"picture {self.index} ({type(self.source).__name__})"

    def fail(self, error: Exception) -> None:
        """Notes an error about this picture alone."""
        text, name = str(error), printable(self.name)
        if not isinstance(error, ImageError) or name not in text:
            cause, error = error, ImageError(text if name in text else f"{name}: {text}")
            error.__cause__ = cause
        self.error, self.pixels = error, None


def _results(
    images: Iterator[Any], runner: "_Runner", reader: "_Reader", lookahead: int, keep_pixels: bool
) -> Iterator[Result]:
    slots: deque[_Slot] = deque()
    taken = 0
    end: Exception | None = None  # StopIteration, or what `images` raised: that waits until its turn
    try:
        while True:
            while end is None and len(slots) < lookahead and not reader.full:
                try:
                    slots.append(_Slot(taken, next(images)))
                except Exception as error:
                    end = error
                else:
                    reader.put(slots[-1])
                    taken += 1
            if not slots:
                break
            head = slots[0]
            reader.wait(head)
            if head.labels is None and head.error is None:
                batch = _batch_of_head(slots, reader, runner.batch_size)
                runner.run(batch)
                for slot in batch:
                    slot.pixels = slot.pixels if keep_pixels else None
                del batch, slot
            if isinstance(head.error, ImageError):
                head.fail(head.error)
            elif isinstance(head.error, Exception):  # not the picture's fault
                raise RuntimeError(f"{head.name}: {type(head.error).__name__}: {head.error}") from head.error
            elif head.error is not None:  # KeyboardInterrupt, SystemExit ...: nobody's fault
                raise head.error
            reader.release(slots.popleft())
            result = Result(head.index, head.source, head.pixels, head.labels, head.error)
            del head
            yield result
            del result
        if not isinstance(end, StopIteration):
            raise end
    finally:
        reader.close()


def _batch_of_head(slots: Iterable[_Slot], reader: "_Reader", batch_size: int) -> list[_Slot]:
    """The first picture, and those behind it of its size that have no labels yet, up to batch_size."""
    batch: list[_Slot] = []
    nbytes = 0
    for slot in slots:
        reader.wait(slot)
        nbytes += slot.nbytes
        if slot.labels is None and slot.error is None and (not batch or slot.pixels.shape == batch[0].pixels.shape):
            batch.append(slot)
        if len(batch) == batch_size or nbytes > MAX_BYTES:  # beyond it, reading may have paused
            break
    return batch


class _Runner:
    """Runs batches, smaller ones after running out of memory."""

    def __init__(self, model: torch.nn.Module, batch_size: int, window_batch_size: int, options: dict[str, Any]):
        self.model = model
        self.batch_size = batch_size
        self.window_batch_size = window_batch_size
        self.options = options
        self._cause = ""  # the last message about memory

    def run(self, batch: Sequence[_Slot]) -> None:
        """Sets labels or error of each slot; their pictures are of one size."""
        while batch:
            part = batch[: self.batch_size]
            try:
                labels = self._try(part)
            except ValueError as error:  # too long and thin to be enlarged, or scores that are not finite
                if len(part) == 1:
                    part[0].fail(error)
                else:  # perhaps the fault of one of them
                    for slot in part:
                        self.run([slot])
            else:
                if labels is None:
                    self._halve(part)
                    continue
                for slot, own in zip(part, labels, strict=True):
                    slot.labels = own if len(part) == 1 else own.clone()  # a view would keep the whole batch alive
            batch = batch[len(part) :]

    def _try(self, part: Sequence[_Slot]) -> torch.Tensor | None:
        """Labels (B, H, W), or None: not enough memory."""
        try:
            pixels = part[0].pixels[None] if len(part) == 1 else np.stack([slot.pixels for slot in part])
            pixels = torch.from_numpy(pixels)
            return segment_pixels(self.model, pixels, batch_size=self.window_batch_size, **self.options)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._cause = cause(error)
        return None  # here, where the traceback and the tensors that it holds are gone

    def _halve(self, part: Sequence[_Slot]) -> None:
        """Makes the next batches smaller, and says so; raises PictureMemoryError if they cannot be."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        h, w = part[0].pixels.shape[:2]
        if len(part) > 1:
            self.batch_size = len(part) // 2
            tried, now = f"{len(part)} pictures of {w}x{h} at once", f"{self.batch_size} a batch"
        elif self.window_batch_size > 1:
            self.window_batch_size //= 2
            tried, now = f"a picture of {w}x{h}", f"at most {self.window_batch_size} windows a forward call"
        else:
            raise PictureMemoryError(
                part[0].source,
                f"{part[0].name}: not enough memory for a picture of {w}x{h} by one window at a time; use a smaller "
                f"window_size, smaller scales, half precision or another device ({self._cause})",
            )
        warnings.warn(f"not enough memory for {tried}; from here on {now}", stacklevel=2)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_NO_MEMORY.search(str(error)))


class _Reader:
    """Threads that read pictures in the order they are put, and pause while what is read holds more than MAX_BYTES."""

    def __init__(self, workers: int):
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._waiting: deque[_Slot] = deque()
        self._wanted: _Slot | None = None
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def full(self) -> bool:
        return self._held > MAX_BYTES

    def put(self, slot: _Slot) -> None:
        """Has a path read by a thread; anything else is read at once: its owner may change or close it."""
        if not isinstance(slot.source, str | os.PathLike):
            self._read(slot)
            if slot.error is not None and not isinstance(slot.error, Exception):  # Ctrl-C does not wait for its turn
                raise slot.error
            return
        with self._changed:
            self._waiting.append(slot)
            self._changed.notify_all()
        if len(self._threads) < self._workers:
            # daemons: a stream that nobody closes, or a file system that hangs, must not keep Python from ending
            self._threads.append(threading.Thread(target=self._work, name="segmenter-reader", daemon=True))
            self._threads[-1].start()

    def wait(self, slot: _Slot) -> None:
        """Returns once the slot is read; those put before it must have been waited for."""
        with self._changed:
            self._wanted = slot  # so it is the next one to be read, and is read however much is held
            self._changed.notify_all()
            while not slot.read:
                self._changed.wait()

    def release(self, slot: _Slot) -> None:
        """Its bytes count no longer."""
        with self._changed:
            self._held -= slot.nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads. One that is reading is given a second; it ends by itself after that picture."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS / len(self._threads))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._may_read():
                    self._changed.wait()
                if self._closed:
                    return
                slot = self._waiting.popleft()
            self._read(slot)
            del slot  # while it waits, the thread keeps no picture alive

    def _may_read(self) -> bool:
        return bool(self._waiting) and (not self.full or self._waiting[0] is self._wanted)

    def _read(self, slot: _Slot) -> None:
        try:
            slot.pixels = read_image(slot.source)
        except BaseException as error:  # whatever it is: somebody waits for this slot
            slot.error = error
        with self._changed:
            slot.nbytes = 0 if slot.pixels is None else slot.pixels.nbytes
            self._held += slot.nbytes
            slot.read = True
            self._changed.notify_all()
