"""Many images to labels: read in threads, batched by size, given out in the order they came in.

The look-ahead is a short queue of images. The next batch is always that of the first image without labels, with the
images of its size that stand behind it: so a rare size never waits, and which images share a batch depends on sizes
and order alone, not on how fast anything was read.
"""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from segmenter.errors import cause, is_out_of_memory, printable
from segmenter.inference.images import ImageError, read_image
from segmenter.inference.precision import compute_dtype
from segmenter.inference.read_ahead import Call, ReadAhead, usual_workers
from segmenter.inference.segment import enqueue, refuse_options, usual_batch_size
from segmenter.inference.transfers import Download

OnError = str | Callable[[int, Any, ImageError], None]


class Result(NamedTuple):
    """What became of one image; either `labels` or `error` is None.

    Attributes:
        index: position in the stream, from 0. source: what came in.
        pixels: (H, W, 3) uint8, or None if they were not to be kept. labels: (H, W), as of `segment_image`.
        error: why there are no labels; the message names the image.
    """

    index: int
    source: Any
    pixels: np.ndarray | None
    labels: torch.Tensor | None
    error: ImageError | None


class ImageMemoryError(torch.OutOfMemoryError):
    """One window of one image is too much for the memory. Attribute `source`: the image."""

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
    cuda_graphs: bool = True,
    workers: int | None = None,
    lookahead: int | None = None,
    on_error: OnError = "report",
    progress: bool | None = None,
) -> Iterator[torch.Tensor | None]:
    """Labels of many images, in their order: `for labels in segment_stream(model, paths):`.

    Args:
        model: a `Segmenter` in evaluation mode.
        images: whatever `segmenter.inference.images.read_image` takes, in a list or any other iterable, also an endless
            one. Paths are read in threads. Arrays, tensors and PIL images are copied as soon as they come, so a
            generator may fill the same buffer again.
        batch_size: images of one size to run together; by default 1 on a CPU, 8 elsewhere. After running out of
            memory it is halved for the rest of the stream, with a warning; for a single image, window_batch_size is.
        scales, flip, window_size, window_stride, dtype, cuda_graphs: see `segmenter.inference.segment.segment_image`.
        window_batch_size: windows a forward call; by default batch_size, but at least 8 if not on a CPU.
        workers: threads that read; by default one a processor, at most 4.
        lookahead: images taken from `images` before the first of them is given out, at least batch_size. By default
            enough for four batches, and two a worker. For live images take 1, with batch_size=1.
        on_error: what to do about an image that cannot be read or run. "report": warn, and give None in its place.
            "raise": raise the ImageError when its turn comes. A function: call it with (index, image, ImageError),
            and give None.
        progress: a progress bar on stderr; None: if that is a terminal.
    Yields:
        labels (H, W) as of `segment_image`, a tensor of its own; None for an image without labels.
    Raises:
        at once: TypeError, ValueError: arguments that make no sense. RuntimeError: training mode.
        in its turn: ImageMemoryError: one window is too much. What `images` raises, after the images before it.

    Memory beside that of `segment_image` for a batch: `lookahead` images of 3 bytes a pixel, and 1 to 4 for labels.
    Reading pauses while they hold more than `read_ahead.MAX_BYTES` (1 GiB), so they hold at most that and one image a
    worker; batches are then made of what is there. Close the generator, or exhaust it, to end its threads.
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
        cuda_graphs=cuda_graphs,
        workers=workers,
        lookahead=lookahead,
        keep_pixels=False,
    )
    total = len(images) if isinstance(images, Sized) else None
    return _labels(stream, total, on_error, None if progress is None else not progress)


def _labels(
    stream: Iterator[Result], total: int | None, on_error: OnError, no_bar: bool | None
) -> Iterator[torch.Tensor | None]:
    bar = tqdm(total=total, unit="image", disable=no_bar)  # None: no bar unless on a terminal
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
    cuda_graphs: bool = True,
    workers: int | None = None,
    lookahead: int | None = None,
    keep_pixels: bool = True,
) -> Iterator[Result]:
    """As `segment_stream`, with all that is known of each image; `keep_pixels`: the image too."""
    if isinstance(images, str | os.PathLike | Image.Image):
        raise TypeError(f"expected many images, got one ({type(images).__name__}); use segment(), or give a list")
    if model.training:
        raise RuntimeError("the model is in training mode: dropout would make the labels random; call model.eval()")
    usual = usual_batch_size(next(model.parameters()).device)
    batch_size = usual if batch_size is None else batch_size
    window_batch_size = max(batch_size, usual) if window_batch_size is None else window_batch_size
    workers = usual_workers() if workers is None else workers
    lookahead = max(4 * batch_size, 2 * workers) if lookahead is None else lookahead
    counts = {"batch_size": batch_size, "window_batch_size": window_batch_size, "workers": workers}
    for name, value in {**counts, "lookahead": lookahead}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if lookahead < batch_size:
        raise ValueError(f"lookahead={lookahead} images can never fill a batch of {batch_size}")
    # each image would be refused for these, one by one
    refuse_options(model, scales, flip, window_size, window_stride)
    window = model.info.window_size if window_size is None else window_size
    if window < 1 or (window_stride is not None and not 1 <= window_stride <= window):
        raise ValueError(f"need 1 <= window_stride <= window_size, got {window_stride} and {window}")
    compute_dtype(model, dtype)
    options = {"scales": scales, "flip": flip, "window_size": window_size, "window_stride": window_stride}
    runner = _Runner(model, batch_size, window_batch_size, {**options, "dtype": dtype, "cuda_graphs": cuda_graphs})
    return _results(iter(images), runner, ReadAhead(workers), lookahead, keep_pixels)


@dataclass(eq=False)
class _Slot(Call):
    """An image in the look-ahead: its `source`, and its pixels as `value`. `under_way`: its labels are being made."""

    index: int = 0
    under_way: bool = False
    labels: torch.Tensor | None = None

    @property
    def finished(self) -> bool:
        return self.labels is not None or self.error is not None

    @property
    def name(self) -> str:
        if isinstance(self.source, str | os.PathLike):
            with contextlib.suppress(Exception):  # a path need not know its name
                return os.fsdecode(self.source)
        return f"image {self.index} ({type(self.source).__name__})"

    def fail(self, error: Exception) -> None:
        """Notes an error about this image alone."""
        text, name = str(error), printable(self.name)
        if not isinstance(error, ImageError) or name not in text:
            cause, error = error, ImageError(text if name in text else f"{name}: {text}")
            error.__cause__ = cause
        self.error, self.value, self.under_way = error, None, False


def _results(
    images: Iterator[Any], runner: "_Runner", reader: ReadAhead, lookahead: int, keep_pixels: bool
) -> Iterator[Result]:
    slots: deque[_Slot] = deque()
    taken = 0
    end: Exception | None = None  # StopIteration, or what `images` raised: that waits until its turn
    try:
        while True:
            while end is None and len(slots) < lookahead and not reader.full:
                try:
                    slots.append(_Slot(read_image, next(images), index=taken))
                except Exception as error:
                    end = error
                else:
                    _read(slots[-1], reader)
                    taken += 1
            if not slots:
                break
            head = slots[0]
            reader.wait(head)
            while not head.finished:
                if not runner.under_way:
                    runner.run(_next_batch(slots, reader, runner.batch_size))
                if runner.may_run_ahead and (batch := _next_batch(slots, reader, runner.batch_size)):
                    runner.run_ahead(batch)
                for slot in (batch := runner.finish()):
                    slot.value = slot.value if keep_pixels or not slot.finished else None
                batch = slot = None  # the consumer may take its time
            if isinstance(head.error, ImageError):
                head.fail(head.error)
            elif isinstance(head.error, Exception):  # not the image's fault
                raise RuntimeError(f"{head.name}: {type(head.error).__name__}: {head.error}") from head.error
            elif head.error is not None:  # KeyboardInterrupt, SystemExit ...: nobody's fault
                raise head.error
            reader.release(slots.popleft())
            result = Result(head.index, head.source, head.value, head.labels, head.error)
            del head
            yield result
            del result
        if not isinstance(end, StopIteration):
            raise end
    finally:
        reader.close()


def _read(slot: _Slot, reader: ReadAhead) -> None:
    """Has a path read by a thread; anything else is read at once: its owner may change or close it."""
    if isinstance(slot.source, str | os.PathLike):
        reader.put(slot)
        return
    reader.run(slot)
    if slot.error is not None and not isinstance(slot.error, Exception):  # Ctrl-C does not wait for its turn
        raise slot.error


def _next_batch(slots: Iterable[_Slot], reader: ReadAhead, batch_size: int) -> list[_Slot]:
    """The first image that nobody has run yet, and those behind it of its size, up to batch_size."""
    batch: list[_Slot] = []
    nbytes = 0
    for slot in slots:
        reader.wait(slot)
        nbytes += slot.nbytes
        waits = not (slot.finished or slot.under_way)
        if waits and (not batch or slot.value.shape == batch[0].value.shape):
            batch.append(slot)
        if len(batch) == batch_size or nbytes > reader.max_bytes:  # beyond it, reading may have paused
            break
    return batch


def _computes_beside_the_host(model: torch.nn.Module) -> bool:
    return next(model.parameters()).is_cuda


class _Runner:
    """Runs batches, smaller ones after running out of memory. On a GPU the next is enqueued while one is computed.

    Attributes:
        under_way: images, and their labels on the way.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int, window_batch_size: int, options: dict[str, Any]):
        self.model = model
        self.batch_size = batch_size
        self.window_batch_size = window_batch_size
        self.options = options
        self.under_way: deque[tuple[Sequence[_Slot], Download]] = deque()
        self._cause = ""  # the last message about memory
        self._fits_two = True  # batches at a time

    @property
    def may_run_ahead(self) -> bool:
        return len(self.under_way) == 1 and self._fits_two and _computes_beside_the_host(self.model)

    def run(self, batch: Sequence[_Slot]) -> None:
        """Begins with images of one size; `finish` sets the labels or the error of each."""
        while batch:
            part = batch[: self.batch_size]
            try:
                labels = self._try(part)
            except ValueError as error:  # too long and thin to be enlarged
                self._fail(part, error)
            else:
                if labels is None:
                    self._halve(part)
                    continue
                self._add(part, labels)
            batch = batch[len(part) :]

    def run_ahead(self, batch: Sequence[_Slot]) -> None:
        """`run` beside a batch that is under way. What goes wrong is met again in its turn; once memory did not suffice
        for two, the rest of the stream runs one at a time."""
        with contextlib.suppress(Exception):
            labels = self._try(batch, give_way=False)
            self._fits_two = labels is not None
            if labels is not None:
                self._add(batch, labels)

    def finish(self) -> Sequence[_Slot]:
        """Waits for the batch that is under way for longest; its images, some of which may be under way again."""
        if not self.under_way:  # each has an error
            return ()
        part, labels = self.under_way.popleft()
        try:
            labels = labels.fetch()
        except ValueError as error:  # scores that are not finite
            self._fail(part, error)
        else:
            for slot, rows in zip(part, labels, strict=True):
                slot.under_way = False
                slot.labels = rows if len(part) == 1 else rows.clone()  # a view would keep the whole batch alive
        return part

    def _add(self, part: Sequence[_Slot], labels: Download) -> None:
        self.under_way.append((part, labels))
        for slot in part:
            slot.under_way = True

    def _fail(self, part: Sequence[_Slot], error: ValueError) -> None:
        if len(part) == 1:
            part[0].fail(error)
        else:  # perhaps the fault of one of them
            for slot in part:
                self.run([slot])

    def _try(self, part: Sequence[_Slot], give_way: bool = True) -> Download | None:
        """Labels (B, H, W) on their way, or None: not enough memory."""
        try:
            pixels = part[0].value[None] if len(part) == 1 else np.stack([slot.value for slot in part])
            pixels = torch.from_numpy(pixels)
            options = {**self.options, "batch_size": self.window_batch_size, "give_way": give_way}
            return enqueue(self.model, pixels, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._cause = cause(error)
        return None  # here, where the traceback and the tensors that it holds are gone

    def _halve(self, part: Sequence[_Slot]) -> None:
        """Makes the next batches smaller, and says so; raises ImageMemoryError if they cannot be."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        h, w = part[0].value.shape[:2]
        if len(part) > 1:
            self.batch_size = len(part) // 2
            tried, now = f"{len(part)} images of {w}x{h} at once", f"{self.batch_size} a batch"
        elif self.window_batch_size > 1:
            self.window_batch_size //= 2
            tried, now = f"an image of {w}x{h}", f"at most {self.window_batch_size} windows a forward call"
        else:
            raise ImageMemoryError(
                part[0].source,
                f"{part[0].name}: not enough memory for an image of {w}x{h} by one window at a time; use a smaller "
                f"window_size, smaller scales, half precision or another device ({self._cause})",
            )
        warnings.warn(f"not enough memory for {tried}; from here on {now}", stacklevel=2)
