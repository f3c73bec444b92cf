"""Many images to labels: `segment_stream`."""

import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter import segment_stream
from segmenter.inference import read_ahead
from segmenter.inference import stream as stream_module
from segmenter.inference.images import ImageError, read_image
from segmenter.inference.stream import ImageMemoryError, results
from tests.cli.tools import image

ROOT = Path(__file__).parents[2]
SIZES = {"A": (70, 91), "B": (64, 64), "C": (80, 70)}
CPU_OUT_OF_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def images(sizes):
    return [image(*SIZES[size], seed=i) for i, size in enumerate(sizes)]


def save(folder, arrays):
    paths = [folder / f"{i}.png" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


def assert_labels(model, got, arrays):
    for labels, array in zip(got, arrays, strict=True):
        assert torch.equal(labels, model.segment(array))


def reader_threads():
    return [t for t in threading.enumerate() if t.name == "segmenter-reader"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert reader_threads() == []


@pytest.fixture
def batches(monkeypatch):
    """(images, height, width) of each call of enqueue, and windows a call."""
    calls = []
    enqueue = stream_module.enqueue

    def spy(model, pixels, **options):
        calls.append((*pixels.shape[:3], options["batch_size"]))
        return enqueue(model, pixels, **options)

    monkeypatch.setattr(stream_module, "enqueue", spy)
    return calls


@pytest.fixture
def slow(monkeypatch):
    """The first images take the longest to read."""
    delays = itertools.chain([0.2, 0.1, 0.05], itertools.repeat(0))

    def read(source):
        time.sleep(next(delays))
        return read_image(source)

    monkeypatch.setattr(stream_module, "read_image", read)


def test_labels_come_in_order_however_long_reading_takes(model, tmp_path, slow):
    arrays = images("ABAACBBAAB")
    stream = model.segment_stream(save(tmp_path, arrays), batch_size=2, workers=3)
    assert_labels(model, stream, arrays)


@pytest.mark.parametrize("timing", ["fast", "slow"])
def test_images_of_one_size_run_together_and_the_first_one_never_waits(model, tmp_path, batches, timing, request):
    if timing == "slow":  # which images share a batch does not depend on it
        request.getfixturevalue("slow")
    paths = save(tmp_path, images("ABAABCAB" + "A" * 5))
    assert len(list(segment_stream(model, paths, batch_size=2, lookahead=6, workers=3))) == 13
    # look-ahead of 6: A0 A2 | B1 B4 | A3 A6 | C5 | B7 alone, no other B in sight | the rest
    sizes = ["A", "B", "A", "C", "B", "A", "A", "A"]
    assert [call[1:3] for call in batches] == [SIZES[size] for size in sizes]
    assert [call[0] for call in batches] == [2, 2, 2, 1, 1, 2, 2, 1]


def test_options_reach_the_model(model, batches):
    arrays = images("AAA")
    options = {"window_size": 48, "window_stride": 30, "scales": (0.75, 1.5), "flip": True, "dtype": "bfloat16"}
    got = list(model.segment_stream(arrays, batch_size=3, window_batch_size=2, **options))
    assert [call[0] for call in batches] == [3]
    assert batches[0][3] == 2
    differing = 0
    for labels, array in zip(got, arrays, strict=True):
        # another number of images a product may round in another way: labels differ where two classes tie
        assert (labels != model.segment(array, batch_size=2, **options)).float().mean() < 0.02
        differing += int((labels != model.segment(array)).sum())
    assert differing > 100


@pytest.mark.parametrize(("batch_size", "expected"), [(None, (1, 1)), (4, (4, 4))])
def test_windows_a_forward_call_follow_the_batch(model, batches, batch_size, expected):
    assert len(list(segment_stream(model, images("AAAA"), batch_size=batch_size))) == 4
    assert (batches[0][0], batches[0][3]) == expected


def test_nothing_is_taken_before_it_is_needed(model):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield image(seed=i)

    stream = segment_stream(model, endless(), batch_size=2, lookahead=5)
    assert taken == []
    got = []
    for i in range(7):
        got.append(next(stream))
        assert len(taken) == 5 + i
    stream.close()
    assert_labels(model, got, [image(seed=i) for i in range(7)])


def test_one_image_at_a_time_for_live_images(model):
    taken = []
    live = (taken.append(i) or image(seed=i) for i in itertools.count())
    with_labels = zip(segment_stream(model, live, batch_size=1, lookahead=1), range(3), strict=False)
    assert [len(taken) for _ in with_labels] == [1, 2, 3]


def test_no_images(model):
    assert list(segment_stream(model, [])) == []
    assert list(segment_stream(model, iter(()), progress=True)) == []


def test_images_are_copied_when_they_come(model, tmp_path):
    """A generator may fill one buffer again and again, and close its files."""
    arrays = images("AAAA")
    save(tmp_path, arrays)

    def generate():
        buffer = np.empty_like(arrays[0])
        for array in arrays[:2]:
            buffer[:] = array
            yield buffer
        for i in (2, 3):
            with Image.open(tmp_path / f"{i}.png") as image:
                yield image

    assert_labels(model, segment_stream(model, generate(), batch_size=4), arrays)


def test_labels_of_a_batch_share_no_memory(model):
    first, second = segment_stream(model, images("AA"), batch_size=2)
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 70 * 91
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


# -- images that cannot be used -----------------------------------------------------------------------------------


def unusable(folder):
    """Ten images of which 2, 5 and 7 cannot be read, and the arrays of the others."""
    arrays = images("AAAAAAAAAA")
    sources = save(folder, arrays)
    sources[2].write_bytes(sources[2].read_bytes()[:200])
    sources[5] = str(folder / "none.png")
    sources[7] = np.zeros((4, 4, 7), np.uint8)
    return sources, {i: array for i, array in enumerate(arrays) if i not in (2, 5, 7)}


def test_unreadable_images_are_reported_and_the_rest_is_done(model, tmp_path):
    sources, arrays = unusable(tmp_path)
    with pytest.warns(UserWarning) as caught:
        got = list(segment_stream(model, sources, batch_size=4))
    texts = [str(w.message) for w in caught]
    assert len(texts) == 3
    assert texts[0].startswith(f"{sources[2]}: ")
    assert texts[1] == f"{sources[5]}: No such file or directory; None is given for its labels"
    assert texts[2].startswith("image 7 (ndarray): one image (H, W)")
    assert {w.filename for w in caught} == {__file__}
    assert [i for i, labels in enumerate(got) if labels is None] == [2, 5, 7]
    assert_labels(model, [labels for labels in got if labels is not None], arrays.values())


def test_unreadable_images_go_to_a_function(model, tmp_path):
    sources, _ = unusable(tmp_path)
    told = []
    got = list(segment_stream(model, sources, on_error=lambda *entry: told.append(entry)))
    assert [entry[0] for entry in told] == [2, 5, 7]
    assert all(entry[1] is sources[entry[0]] for entry in told)
    assert all(isinstance(entry[2], ImageError) for entry in told)
    assert sum(labels is None for labels in got) == 3


def test_unreadable_images_end_the_stream_if_asked_to(model, tmp_path):
    sources, arrays = unusable(tmp_path)
    stream = segment_stream(model, sources, on_error="raise", batch_size=4)
    assert_labels(model, itertools.islice(stream, 2), [arrays[0], arrays[1]])
    with pytest.raises(ImageError, match="2.png: "):
        next(stream)
    assert list(stream) == []


def test_an_image_that_cannot_be_run_fails_alone(model, monkeypatch):
    enqueue = stream_module.enqueue
    arrays = images("AAA")
    arrays[1] = np.full_like(arrays[1], 255)

    def overflow(model, pixels, **options):
        if any(bool((x == 255).all()) for x in pixels):
            raise ValueError("the network gave NaN")
        return enqueue(model, pixels, **options)

    monkeypatch.setattr(stream_module, "enqueue", overflow)
    thin = np.zeros((1, 30_000, 3), np.uint8)
    got = list(results(model, [*arrays, thin], batch_size=4, window_size=512, window_stride=512))
    assert [str(r.error)[:40] for r in got if r.error] == [
        "image 1 (ndarray): the network gave NaN",
        "image 3 (ndarray): an image of 30000x1 w",
    ]
    assert [r.labels is None for r in got] == [False, True, False, True]
    assert torch.equal(got[2].labels, model.segment(arrays[2], window_size=512, window_stride=512))


def test_other_errors_of_a_reader_name_the_image(model, monkeypatch, tmp_path):
    paths = save(tmp_path, images("AAA"))

    def read(source):
        if source == paths[1]:
            raise ZeroDivisionError("surprise")
        return read_image(source)

    monkeypatch.setattr(stream_module, "read_image", read)
    stream = segment_stream(model, paths)
    assert next(stream).shape == (70, 91)
    with pytest.raises(RuntimeError, match=r"1\.png: ZeroDivisionError: surprise") as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Broken(os.PathLike):
    def __fspath__(self):
        raise ZeroDivisionError("no name")


def test_a_path_that_has_no_name_hangs_nothing(model):
    with pytest.warns(UserWarning, match=r"image 1 \(Broken\): .*no name"):
        labels = list(segment_stream(model, [image := images("A")[0], Broken(), image]))
    assert labels[1] is None
    assert_labels(model, labels[::2], [image, image])


def test_an_error_of_the_iterable_comes_after_the_images_before_it(model):
    def generate():
        yield from images("AB")
        raise KeyError("no more")

    stream = segment_stream(model, generate(), batch_size=2)
    assert_labels(model, [next(stream), next(stream)], images("AB"))
    with pytest.raises(KeyError, match="no more"):
        next(stream)


def test_reading_in_threads_leaves_the_filters_of_warnings_alone(model, tmp_path, monkeypatch):
    filters = []
    image_open = Image.open
    monkeypatch.setattr(
        Image, "open", lambda *args, **kwargs: filters.append(list(warnings.filters)) or image_open(*args, **kwargs)
    )
    before = list(warnings.filters)
    assert len(list(segment_stream(model, save(tmp_path, images("AAA"))))) == 3
    assert filters == [before] * 3


# -- memory ---------------------------------------------------------------------------------------------------------


def exhaust(monkeypatch, batches, fits, error):
    """Calls that do not fit in memory raise `error`; `fits(images, windows)`."""
    spied = stream_module.enqueue

    def limited(model, pixels, **options):
        if fits(len(pixels), options["batch_size"]):
            return spied(model, pixels, **options)
        batches.append("no memory")
        raise error

    monkeypatch.setattr(stream_module, "enqueue", limited)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_OUT_OF_MEMORY), MemoryError()], ids=repr
)
def test_batches_are_halved_when_memory_runs_out_and_nothing_is_lost(model, monkeypatch, batches, error):
    exhaust(monkeypatch, batches, lambda images, windows: images <= 2, error)
    arrays = images("A" * 8 + "B" + "A" * 5)
    with pytest.warns(UserWarning, match="not enough memory") as caught:
        got = list(segment_stream(model, arrays, batch_size=8))
    assert_labels(model, got, arrays)
    assert [str(w.message) for w in caught] == [
        "not enough memory for 8 images of 91x70 at once; from here on 4 a batch",
        "not enough memory for 4 images of 91x70 at once; from here on 2 a batch",
    ]
    sizes = [call if call == "no memory" else call[0] for call in batches]
    assert sizes == ["no memory", "no memory", 2, 2, 2, 2, 1, 2, 2, 1], "the smaller size stays"


def test_then_windows_a_call_are_halved(model, monkeypatch, batches):
    exhaust(monkeypatch, batches, lambda images, windows: windows * images <= 1, torch.OutOfMemoryError("no"))
    arrays = images("CCC")
    with pytest.warns(UserWarning) as caught:
        assert_labels(model, segment_stream(model, arrays, batch_size=2, window_batch_size=4), arrays)
    assert [str(w.message).split("from here on ")[1] for w in caught] == [
        "1 a batch",
        "at most 2 windows a forward call",
        "at most 1 windows a forward call",
    ]


def test_one_window_too_much_says_what_to_do(model, monkeypatch, batches):
    exhaust(monkeypatch, batches, lambda *_: False, torch.OutOfMemoryError("CUDA out of memory"))
    sources = ["first", *images("A")]
    with pytest.raises(ImageMemoryError, match="use a smaller window_size.*CUDA out of memory") as caught:
        list(segment_stream(model, sources, on_error=lambda *_: None))
    assert caught.value.source is sources[1]
    assert isinstance(caught.value, torch.OutOfMemoryError)


def test_other_errors_of_the_model_are_not_taken_for_memory(model, monkeypatch, batches):
    exhaust(monkeypatch, batches, lambda *_: False, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(segment_stream(model, images("AA"), batch_size=2))
    assert batches == ["no memory"], "tried once"


@pytest.mark.parametrize("limit", [0, 1, 2 * 70 * 91 * 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_reading_pauses_when_much_is_waiting(model, tmp_path, monkeypatch, limit, mixed):
    """At most the limit and one image a worker are held; it ends whatever comes from files and what from memory."""
    monkeypatch.setattr(read_ahead, "MAX_BYTES", limit)
    arrays = images("A" * 12)
    paths = save(tmp_path, arrays)
    sources = [arrays[i] if mixed and i % 3 else path for i, path in enumerate(paths)]
    nbytes = arrays[0].nbytes
    held = []
    run = read_ahead.ReadAhead.run

    def watched(self, call):
        run(self, call)
        held.append(self._held)

    monkeypatch.setattr(read_ahead.ReadAhead, "run", watched)
    assert_labels(model, segment_stream(model, sources, batch_size=4, workers=2), arrays)
    assert len(held) == 12
    assert nbytes <= max(held) <= limit + (3 if mixed else 2) * nbytes


def test_a_file_is_read_although_images_behind_it_fill_the_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 0)
    arrays = images("AAA")
    paths = save(tmp_path, arrays)

    def read(source):
        if source is paths[0]:
            time.sleep(0.2)  # meanwhile the array is taken; the only worker comes to the second file after that
        return read_image(source)

    monkeypatch.setattr(stream_module, "read_image", read)
    assert_labels(model, segment_stream(model, [*paths[:2], arrays[2]], workers=1), arrays)


# -- how it ends ----------------------------------------------------------------------------------------------------


def test_closing_ends_the_threads(model, tmp_path):
    stream = segment_stream(model, save(tmp_path, images("A" * 12)), workers=3)
    next(stream)
    assert len(reader_threads()) == 3
    stream.close()
    assert reader_threads() == []


def test_leaving_the_loop_ends_the_threads(model, tmp_path):
    for _ in segment_stream(model, save(tmp_path, images("A" * 12))):
        assert reader_threads()
        break
    assert reader_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_ends_the_threads(model, tmp_path, monkeypatch, error):
    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr(stream_module, "enqueue", interrupted)
    with pytest.raises(error):
        next(segment_stream(model, save(tmp_path, images("A" * 12))))
    assert reader_threads() == []


def test_closing_does_not_wait_for_a_file_that_hangs(model, tmp_path, monkeypatch):
    paths = save(tmp_path, images("AAA"))
    hangs = threading.Event()
    monkeypatch.setattr(read_ahead, "_CLOSING_SECONDS", 0.05)
    monkeypatch.setattr(
        stream_module, "read_image", lambda path: (path == paths[2] and hangs.wait(), read_image(path))[1]
    )
    stream = segment_stream(model, paths, workers=2)
    next(stream)
    stream.close()
    (left,) = reader_threads()
    hangs.set()
    left.join(10)


def test_python_ends_although_a_stream_is_left_and_a_file_hangs(tmp_path):
    paths = save(tmp_path, images("AA"))
    code = (
        "import threading, segmenter.inference.stream as s; from tests.support.tiny import tiny_model\n"
        "read = s.read_image\n"
        f"s.read_image = lambda path: threading.Event().wait() if path == {str(paths[1])!r} else read(path)\n"
        f"stream = s.segment_stream(tiny_model(), {[str(p) for p in paths]})\n"
        "print(next(stream).shape)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "torch.Size([70, 91])\n"), result.stderr


# -- the rest -------------------------------------------------------------------------------------------------------


def test_progress(model, capsys):
    for progress, shown in ((True, "3/3"), (False, ""), (None, "")):
        assert len(list(segment_stream(model, images("ABA"), progress=progress))) == 3
        err = capsys.readouterr().err
        assert shown in err if shown else err == ""
    assert len(list(segment_stream(model, iter(images("ABA")), progress=True))) == 3
    assert "3image" in capsys.readouterr().err, "how many there are is not known"


@pytest.mark.parametrize(
    ("sources", "options", "error", "message"),
    [
        ("photo.jpg", {}, TypeError, "expected many images, got one"),
        (Path("photo.jpg"), {}, TypeError, "expected many images, got one"),
        ([], {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ([], {"workers": 0}, ValueError, "workers must be at least 1"),
        ([], {"batch_size": 4, "lookahead": 3}, ValueError, "can never fill a batch of 4"),
        ([], {"on_error": "ignore"}, ValueError, '"report", "raise" or a function'),
        ([], {"scales": ()}, ValueError, "scales must be positive"),
        ([], {"window_stride": 65}, ValueError, "window_stride <= window_size, got 65 and 64"),
        ([], {"window_size": 0}, ValueError, "1 <= window_stride"),
        ([], {"dtype": "int8"}, ValueError, "dtype='int8' is unknown"),
        (5, {}, TypeError, "not iterable"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(model, sources, options, error, message):
    with pytest.raises(error, match=message):
        segment_stream(model, sources, **options)


def test_training_mode_is_refused_at_once(model):
    with pytest.raises(RuntimeError, match="training mode"):
        segment_stream(model.train(), [])
