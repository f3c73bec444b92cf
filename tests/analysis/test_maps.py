"""Attention maps of points, classes and class tokens, and rollout: what the whole matrix gives, without it."""

import numpy as np
import pytest
import torch

import segmenter
from segmenter.analysis import AnalysisError, attention
from segmenter.inference.images import normalize
from segmenter.layers import pad_to_multiple
from tests.cli.tools import image
from tests.support.tiny import tiny_model

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def matrices(model, pixels, part="encoder"):
    """(layers, heads, N, N) of the published way, on the padded image."""
    im = pad_to_multiple(normalize(pixels, "vit")[None], model.patch_size)
    get = model.get_attention_map_enc if part == "encoder" else model.get_attention_map_dec
    with torch.no_grad():
        return torch.cat([get(im, layer) for layer in range(len(getattr(model, part).blocks))])


@pytest.mark.parametrize(("h", "w", "distilled"), [(64, 64, False), (70, 91, True), (20, 120, False)])
def test_points_of_any_image(h, w, distilled):
    model, pixels = tiny_model(d_model=128, n_heads=2, distilled=distilled), image(h, w)
    gw, first = -(-w // 16), 1 + distilled
    found = model.attention(pixels, points=[(17.5, 3), (w - 1, h - 1)])
    patches = ((0, 1), ((h - 1) // 16, (w - 1) // 16))
    assert found.patches == patches and found.queries == ("point 17.5 3", f"point {w - 1} {h - 1}")
    assert found.layers == (0, 1) and found.part == "encoder" and found.patch_size == 16
    np.testing.assert_array_equal(found.pixels, pixels)
    rows = matrices(model, pixels)[:, :, [first + gw * y + x for y, x in patches]].transpose(1, 2)
    assert found.maps.shape == (2, 2, 2, -(-h // 16), gw)
    torch.testing.assert_close(found.maps.flatten(-2), rows[..., first:], **CLOSE)
    torch.testing.assert_close(found.others, rows[..., :first], **CLOSE)
    torch.testing.assert_close(found.mean, rows[..., first:].mean(2).unflatten(-1, found.maps.shape[-2:]), **CLOSE)
    assert found.maps.std() > 1e-3


def test_layers_are_chosen():
    model, pixels = tiny_model(), image(64, 64)
    every = attention(model, pixels, points=[(5, 5)])
    for layers, numbers in ((1, (1,)), (-1, (1,)), ([1, 0, -1], (1, 0))):
        found = attention(model, pixels, points=[(5, 5)], layers=layers)
        assert found.layers == numbers
        torch.testing.assert_close(found.maps, every.maps[list(numbers)])


def test_points_layers_and_classes_may_be_arrays_or_one_alone():
    model, pixels = tiny_model(n_cls=11), image(50, 91)
    model.info.classes = "camvid"
    for points in (np.array([[40, 20], [90.5, 49]]), torch.tensor([[40, 20], [90.5, 49]]), ((40, 20), [90.5, 49])):
        found = attention(model, pixels, points=points, layers=np.int64(1))
        assert found.queries == ("point 40 20", "point 90.5 49") and found.patches == ((1, 2), (3, 5))
        assert found.layers == (1,) and type(found.layers[0]) is int
    assert attention(model, pixels, points=[(3, 3)], layers=torch.tensor([1, 0])).layers == (1, 0)
    names = attention(model, pixels, part="decoder").queries
    for classes in ("road", 3, np.int64(3), torch.tensor(3), torch.tensor([3]), ["Road"], ["3"]):
        assert attention(model, pixels, part="decoder", classes=classes).queries == (names[3],)


def test_the_last_fraction_of_a_pixel_is_in_the_last_patch():
    """By rounding it is beyond: 105 pixels brought to 32."""
    found = attention(tiny_model(), image(105, 105), points=[(np.nextafter(105, 0),) * 2], size=32)
    assert found.patches == ((1, 1),)


def test_tokens_before_the_patches():
    model, pixels, done = tiny_model(distilled=True), image(48, 64), []
    found = segmenter.attention(model, pixels, progress=done.append)
    assert found.queries == ("class token", "distillation token") and found.patches == (None, None)
    assert done == [0, 1]
    torch.testing.assert_close(found.maps.flatten(-2), matrices(model, pixels)[:, :, :2, 2:].transpose(1, 2), **CLOSE)


def test_class_tokens_of_the_decoder():
    model, pixels = tiny_model(n_cls=11), image(48, 70)
    model.info.classes = "camvid"
    rows = matrices(model, pixels, "decoder").transpose(1, 2)  # patches, then classes
    found = attention(model, pixels, part="decoder")
    assert len(found.queries) == 11 and found.queries[3] == "class Road"
    torch.testing.assert_close(found.maps.flatten(-2), rows[:, 15:, :, :15], **CLOSE)
    torch.testing.assert_close(found.others, rows[:, 15:, :, 15:], **CLOSE)
    some = attention(model, pixels, part="decoder", classes=["road", 9], points=[(69, 47)])
    assert some.queries == ("point 69 47", "class Road", found.queries[9])
    torch.testing.assert_close(some.maps[:, 1:], found.maps[:, [3, 9]])
    torch.testing.assert_close(some.maps[:, 0].flatten(-2), rows[:, 14, :, :15], **CLOSE)


def test_classes_of_the_encoder_are_the_mean_of_their_patches():
    model, pixels = tiny_model(d_model=128, n_heads=2), image(64, 96)
    with torch.no_grad():
        labels = model.masks_of_pixels(torch.from_numpy(pixels.copy())[None])[0].argmax(0).flatten()
    present = labels.unique().tolist()
    assert len(present) > 1
    found = attention(model, pixels, classes=present, points=[(0, 0)])
    rows = matrices(model, pixels)
    for i, c in enumerate(present, 1):
        want = rows[:, :, 1:][:, :, labels == c].mean(2)
        torch.testing.assert_close(found.maps[:, i].flatten(-2), want[..., 1:], **CLOSE)
    torch.testing.assert_close(found.maps[:, 0].flatten(-2), rows[:, :, 1, 1:], **CLOSE)
    absent = next(c for c in range(5) if c not in present)
    with pytest.raises(AnalysisError, match=f"no patch of this image is '{absent}' to the model; it sees"):
        attention(model, pixels, classes=[absent])


@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_rollout(layers):
    model, pixels = tiny_model(d_model=128, n_heads=2), image(64, 80)
    rolled, products = torch.eye(21), []
    for p in matrices(model, pixels).mean(1):
        rolled = (p + torch.eye(21)) / 2 @ rolled
        products.append(rolled)
    found = attention(model, pixels, points=[(70, 60)], rollout=True, layers=layers)
    assert found.layers == ((1,) if layers is None else (0, 1)) and found.rollout
    want = torch.stack([products[layer][1 + 5 * 3 + 4] for layer in found.layers])[:, None, None]
    torch.testing.assert_close(found.maps.flatten(-2), want[..., 1:], **CLOSE)
    torch.testing.assert_close(found.others, want[..., :1], **CLOSE)


def test_size_scales_image_and_points():
    model, pixels = tiny_model(), image(50, 100)
    found = attention(model, pixels, points=[(99, 49), (24, 14)], size=64, layers=0)
    assert found.pixels.shape == (64, 128, 3) and found.patches == ((3, 7), (1, 1))
    own = attention(model, found.pixels, points=[(127, 63), (31, 17)], layers=0)
    torch.testing.assert_close(found.maps, own.maps)


def test_half_precision():
    model, pixels = tiny_model(), image(64, 64)
    exact, half = (attention(model, pixels, points=[(40, 40)], dtype=dtype) for dtype in (None, "bfloat16"))
    assert half.maps.dtype == torch.float32
    torch.testing.assert_close(half.maps, exact.maps, rtol=0.1, atol=0.01)
    assert not torch.equal(half.maps, exact.maps)


BAD = [
    ({"points": [(64, 3)]}, "point .64, 3. is outside the image of 64 x 48 pixels"),
    ({"points": [(-1, 3)]}, "outside the image"),
    ({"points": []}, "no points and no classes"),
    ({"points": np.zeros((0, 2)), "classes": []}, "no points and no classes"),
    ({"points": (40, 20)}, r"points must be pairs \(x, y\) in pixels such as \[\(40, 60\)\], got \(40, 20\)"),
    ({"points": [(1, 2, 3)]}, "points must be pairs"),
    ({"points": [(1, 2), (3,)]}, "points must be pairs"),
    ({"points": "ab"}, "points must be pairs"),
    ({"points": [(float("nan"), 2)]}, "point .nan, 2. is outside the image"),
    ({"layers": 0.5}, "layers must be whole numbers, got 0.5"),
    ({"layers": "1"}, "layers must be whole numbers, got '1'"),
    ({"layers": 2}, r"layers \[2\] are out of range: the encoder has layers 0..1"),
    ({"layers": []}, "out of range"),
    ({"part": "head"}, "part='head' is unknown; choose encoder or decoder"),
    ({"classes": ["zebra"]}, "class 'zebra': give an id in 0..10, or one of Sky, "),
    ({"classes": [11]}, "class 11: give an id"),
    ({"size": 0}, "size must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=range(len(BAD)))
def test_bad_calls(options, message):
    model = tiny_model(n_cls=11)
    model.info.classes = "camvid"
    with pytest.raises(AnalysisError, match=message):
        attention(model, image(48, 64), **options)


def test_models_that_cannot_be_asked():
    with pytest.raises(AnalysisError, match="training mode"):
        attention(tiny_model().train(), image())
    with pytest.raises(AnalysisError, match="the linear decoder has no attention"):
        attention(tiny_model(decoder={"name": "linear"}), image(), part="decoder")
    with pytest.raises(AnalysisError, match="Linear has no attention layers with qkv and proj; segmenter.load_any"):
        attention(torch.nn.Linear(2, 2).eval(), torch.zeros(1, 3, 32, 32))
