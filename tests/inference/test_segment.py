"""Images to labels: `segment_image` and `model.segment`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import segmenter.inference.merge as merge_module
import segmenter.inference.pruned_argmax as labels_module
import segmenter.inference.windows as windows_module
from bench.published import published_inference
from segmenter import segment_image
from segmenter.inference.images import ImageError, normalize
from segmenter.inference.merge import inference
from segmenter.inference.precision import cpu_has_bfloat16, resolve_dtype
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def image(h=70, w=91, seed=0):
    """Smooth random colours, so that neighbouring pixels get neighbouring labels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (h // 12 + 2, w // 12 + 2, 3), dtype=np.uint8))
    return np.asarray(small.resize((w, h), Image.BICUBIC))


def published_labels(model, pixels, window, stride, flips=(False,)):
    im = normalize(pixels, "vit")[None]
    ims = [im.flip(3) if flip else im for flip in flips]
    return published_inference(model, ims, list(flips), pixels.shape[:2], window, stride, 2).argmax(0)


@pytest.mark.parametrize(("h", "w"), [(70, 91), (64, 64), (40, 50), (33, 200), (1, 1), (1, 9)])
@pytest.mark.parametrize("stride", [64, 40])
def test_labels_are_the_published_ones_at_the_images_own_size(model, h, w, stride):
    pixels = image(h, w)
    got = model.segment(pixels, window_stride=stride)
    assert got.dtype == torch.uint8
    assert got.shape == (h, w)
    assert torch.equal(got.long(), published_labels(model, pixels, 64, stride))
    if min(h, w) > 30:
        assert len(got.unique()) >= 3


def test_labels_do_not_depend_on_blocks_or_batches(model, monkeypatch):
    pixels = image(90, 130)
    want = model.segment(pixels, window_stride=40)
    monkeypatch.setitem(merge_module.BLOCK_BYTES, "cpu", 1)
    assert torch.equal(model.segment(pixels, window_stride=40, batch_size=5), want)


def test_every_kind_of_source_gives_the_same_labels(model, tmp_path):
    pixels = image()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = model.segment(pixels)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), torch.from_numpy(pixels.copy())]
    for source in [*sources, torch.from_numpy(pixels.copy()).permute(2, 0, 1)]:
        assert torch.equal(segment_image(model, source), want)


def test_flip_and_scales(model):
    pixels = image()
    flipped = model.segment(pixels, flip=True)
    assert torch.equal(flipped.long(), published_labels(model, pixels, 64, 64, (False, True)))
    assert torch.equal(flipped, model.segment(pixels[:, ::-1].copy(), flip=True).flip(1))
    multi, p = model.segment(pixels, scales=(1.0, 1.5), return_probabilities=True)
    one, two = (model.segment(pixels, scales=(s,), return_probabilities=True)[1] for s in (1.0, 1.5))
    torch.testing.assert_close(p, (one + two) / 2)
    assert torch.equal(multi.long(), p.argmax(0))
    assert (one - two).abs().max() > 0.01


@pytest.mark.parametrize("side", [64, 40])
def test_an_image_made_smaller_and_larger_again_is_not_the_image(model, side):
    """The published pipeline halves it at scale 0.5, then enlarges it to the window: perhaps to its old size."""
    pixels = image(side, side)
    small = normalize(pixels, "vit")[None]
    small = torch.nn.functional.interpolate(small, (side // 2, side // 2), mode="bilinear")
    want = published_inference(model, [small], [False], (side, side), 64, 64, 2).argmax(0)
    got = model.segment(pixels, scales=(0.5,))
    assert torch.equal(got.long(), want)
    assert not torch.equal(got, model.segment(pixels))


def test_scaled_sides_are_rounded_half_up(model, monkeypatch):
    shapes = []
    original = windows_module.resize
    monkeypatch.setattr(windows_module, "resize", lambda im, size: shapes.append(im.shape) or original(im, size))
    model.segment(image(70, 91), scales=(0.5, 1.5, 0.001))
    assert [tuple(s[2:]) for s in shapes] == [(35, 46), (105, 137), (1, 1)]  # 45.5 and 136.5 go up


def test_probabilities_only_when_asked(model):
    pixels = image()
    labels, probabilities = model.segment(pixels, return_probabilities=True)
    assert probabilities.shape == (5, 70, 91)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(70, 91))
    assert torch.equal(labels, model.segment(pixels))


@pytest.mark.parametrize(("n_cls", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_label_type_holds_every_class(n_cls, dtype):
    model = tiny_model(n_cls=n_cls, decoder={"name": "linear"})
    with torch.no_grad():
        model.decoder.head.bias[-1] = 1e4
    labels = model.segment(image(20, 20))
    assert labels.dtype == dtype
    assert (labels == n_cls - 1).all()


def test_windows_of_the_checkpoint_are_the_default(model):
    pixels = image(130, 150)
    model.info.window_size, model.info.window_stride = 64, 32
    assert torch.equal(model.segment(pixels), model.segment(pixels, window_size=64, window_stride=32))
    # the overlap stays in proportion when only the window is given
    assert torch.equal(model.segment(pixels, window_size=48).long(), published_labels(model, pixels, 48, 24))


def test_normalization_of_the_checkpoint_is_used():
    model = tiny_model()
    pixels = image()
    vit = model.segment(pixels)
    model.info.normalization = "deit"
    assert not torch.equal(model.segment(pixels), vit)


class LargestResult(TorchDispatchMode):
    """Remembers the most elements of any floating-point result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(getattr(self, "numel", 0), tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("window", [{"window_size": 320}, {"window_size": 200, "window_stride": 120}, {"flip": True}])
@pytest.mark.parametrize("noise", [False, True])
def test_the_full_score_map_is_never_held(window, noise, monkeypatch):
    """No tensor near n_cls * H * W appears while labels are made: where few classes can win, and where all can."""
    n_cls, patch = 40, 16
    model = tiny_model(n_cls=n_cls, decoder={"name": "linear"}, n_layers=1)
    if noise:
        masks = torch.randn(9, n_cls, -(-window.get("window_size", 320) // patch), 20)
        monkeypatch.setattr(model, "masks_of_pixels", lambda x: torch.randn(len(x), n_cls, *masks.shape[2:3] * 2))
    for module, name in ((merge_module, "BLOCK_BYTES"), (labels_module, "STRIP_BYTES")):
        small = 40_000 if name == "STRIP_BYTES" else {"cpu": 40_000, "cuda": 40_000}
        monkeypatch.setattr(module, name, small)
    model.info.window_size = model.info.window_stride = 320
    with LargestResult() as largest:
        labels = model.segment(image(320, 320), **window)
    assert len(labels.unique()) > 1
    assert largest.numel < n_cls * 320 * 320 / 10
    with LargestResult() as largest:
        labels = model.segment(image(320, 320), return_probabilities=True)
    assert largest.numel >= n_cls * 320 * 320  # the measure sees it when it is there


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_another_type_run_in_their_own(model, dtype):
    pixels = image()
    want, other = model.segment(pixels), tiny_model().to(dtype)
    for choice in (None, dtype, "auto"):
        assert (other.segment(pixels, dtype=choice) == want).float().mean() > 0.9
    probabilities = inference(other, [normalize(pixels, "vit")[None]], [{"flip": False}], (70, 91), 64, 64, 2)
    assert probabilities.dtype == torch.float32
    with pytest.raises(ValueError, match=r"cannot run in torch.float32; call model\.float\(\) first"):
        other.segment(pixels, dtype="float32")


def test_scores_that_are_not_finite_are_no_labels(model):
    with torch.no_grad():
        model.encoder.blocks[0].mlp.fc2.weight.fill_(1e38)
    with pytest.raises(ValueError, match="the network gave NaN or infinite scores"):
        model.segment(image())


MEASURE = """
import numpy, sys, torch
from pathlib import Path
from segmenter import create_segmenter
from tests.support.tiny import tiny_model
model = tiny_model(decoder={"name": "linear"}, n_layers=1, patch_size=32, image_size=256)
pixels = numpy.zeros((3000, 4000, 3), numpy.uint8)
model.segment(pixels[:300, :300])
status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model.segment(pixels)
print((status("VmHWM") - before) / pixels[..., 0].size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_what_the_docstring_says():
    """Bytes a pixel of a 12 megapixel image; the array itself is the caller's."""
    peaks = []
    while not peaks or min(peaks) >= 9 and len(peaks) < 4:  # what the allocator happens to keep only adds to it
        run = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(float(run.stdout))
    assert 3 < min(peaks) < 9


def test_blocks_stay_small_for_small_images_that_are_enlarged(model, monkeypatch):
    """A row of a tiny image needs many rows of the enlarged one; those are what must fit into a band."""
    sizes = []
    original = merge_module.View._buffer
    monkeypatch.setattr(merge_module.View, "_buffer", lambda *a: sizes.append((b := original(*a)).numel() * 4) or b)
    monkeypatch.setitem(merge_module.BLOCK_BYTES, "cpu", 60_000)
    pixels = image(24, 30)
    labels = model.segment(pixels, window_size=240)
    assert torch.equal(labels.long(), published_labels(model, pixels, 240, 240))
    assert max(sizes) < 2 * 60_000 < 240 * 300 * 5 * 4


def test_training_mode_is_refused(model):
    with pytest.raises(RuntimeError, match=r"call model\.eval"):
        model.train().segment(image())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scales": ()}, "scales must be positive"),
        ({"scales": (0.0,)}, "scales must be positive"),
        ({"scales": (1e4,)}, "would be enlarged to 910000x700000 by the scale 10000.0; use a smaller one"),
        ({"window_size": 0}, "window_size and batch_size must be at least 1"),
        ({"dtype": "int8"}, "choose one of auto, float32, bfloat16, float16"),
        ({"window_stride": 100}, "would leave pixels out"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.segment(image(), **kwargs)


def test_bad_image(model, tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg"):
        model.segment(tmp_path / "none.jpg")


def test_dtypes(model):
    cpu = torch.device("cpu")
    assert resolve_dtype(None, cpu, torch.float64) == torch.float64
    assert resolve_dtype("float16", cpu, torch.float32) == torch.float16
    assert resolve_dtype(torch.bfloat16, cpu, torch.float32) == torch.bfloat16
    assert resolve_dtype("auto", cpu, torch.float32) == (torch.bfloat16 if cpu_has_bfloat16() else torch.float32)
    pixels = image()
    full, half = model.segment(pixels), model.segment(pixels, dtype="bfloat16")
    assert 0.9 < (full == half).float().mean() <= 1
    _, p32 = model.segment(pixels, return_probabilities=True)
    _, p16 = model.segment(pixels, dtype="bfloat16", return_probabilities=True)
    assert 0 < (p32 - p16).abs().max() < 0.2  # it did run in half precision
