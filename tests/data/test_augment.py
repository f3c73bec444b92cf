"""The augmentation of training, against the recipe's figures and other libraries."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segmenter.data import augment
from segmenter.data.augment import Augmentation, distort, resize_labels, resize_pixels, resized

STATISTICS = {  # of the published training, on bytes
    "vit": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "deit": ((123.68, 116.28, 103.53), (58.4, 57.12, 57.38)),
}
NEVER = 0.9  # a coin that says no
CODES = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)], np.uint8)  # colour of a label


class Draws:
    """Stands for numpy's generator: gives out what a test lists, for `random`, `uniform` and `integers` alike."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self, *limits):
        return self.values.pop(0)

    uniform = integers = random


def checkers(h=40, w=56, side=8):
    """An image whose colours tell its labels 0..4, in squares."""
    labels = (np.arange(h)[:, None] // side * 2 + np.arange(w) // side) % 5
    return CODES[labels], labels.astype(np.uint8)


def plain(crop=32, **fields):
    return Augmentation(**{"crop_size": crop, "im_size": 32, "photometric": False, **fields})


def bytes_of(im, normalization="vit"):
    """What the normalised image (3, H, W) was before, (H, W, 3)."""
    mean, std = (np.array(values) for values in STATISTICS[normalization])
    return np.rint(im.numpy().transpose(1, 2, 0) * std + mean).astype(int)


@pytest.mark.parametrize(
    ("shape", "short", "long", "expected"),
    [
        ((480, 640), 512, 2048, (512, 683)),  # 682.67
        ((640, 480), 512, 2048, (683, 512)),
        ((100, 1000), 512, 2048, (205, 2048)),  # 204.8: the long side is the limit
        ((1000, 100), 512, 2048, (2048, 205)),
        ((480, 640), 256.9, 2048, (256, 341)),  # limits are cut to whole pixels first
        ((200, 301), 100, 400, (100, 151)),  # 150.5
        ((3, 4000), 10, 40, (1, 40)),  # never nothing
    ],
)
def test_sizes_are_rounded_as_published(shape, short, long, expected):
    assert resized(shape, short, long) == expected


def test_ratios_are_uniform_between_their_limits(monkeypatch):
    """Seen through the sizes that the resizing is asked for."""
    sizes = []

    def spy(labels, size):
        sizes.append(size)
        return resize_labels(labels, size)

    monkeypatch.setattr(augment, "resize_labels", spy)
    pixels, labels = checkers(30, 40)
    transform = plain(crop=8, im_size=100, scale=(0.5, 2.0))
    for seed in range(300):
        transform(pixels, labels, np.random.default_rng(seed))
    ratios = np.array([h / 100 for h, _ in sizes])
    assert all(abs(w - h * 4 / 3) <= 1 for h, w in sizes)
    assert 0.5 <= ratios.min() < 0.55 and 1.95 < ratios.max() <= 2.0
    shares = np.histogram(ratios, bins=3, range=(0.5, 2.0))[0] / 300  # a geometric draw would give 1/2, 0.29, 0.21
    assert np.abs(shares - 1 / 3).max() < 0.09


def test_long_side_is_limited_by_the_same_ratio():
    pixels, labels = checkers(20, 200)
    _, target = plain(crop=100, im_size=40, max_ratio=2, scale=(1.0, 1.0), flip=0.0)(
        pixels, labels, np.random.default_rng(0)
    )
    inside = target.numpy() != 255
    assert (inside.any(1).sum(), inside.any(0).sum()) == (8, 80)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
def test_a_crop_has_its_size_whatever_comes_in(ratio):
    pixels, labels = checkers()
    im, target = plain(scale=(ratio, ratio))(pixels, labels, np.random.default_rng(0))
    assert (im.shape, im.dtype) == ((3, 32, 32), torch.float32)
    assert (target.shape, target.dtype) == ((32, 32), torch.int64)
    assert set(target.unique().tolist()) - {255} and target[0, 0] != 255


def test_labels_stay_on_their_pixels():
    """Enlarged, cropped and mirrored at random, where the image is of one colour and no blurred seam."""
    pixels, labels = checkers()
    transform, targets = plain(scale=(1.3, 2.0)), set()
    for seed in range(20):
        im, target = transform(pixels, labels, np.random.default_rng(seed))
        assert (target != 255).all()
        seen, target = bytes_of(im), target.numpy()
        far = np.abs(seen[:, :, None] - CODES.astype(int)).sum(-1)  # (H, W, 5)
        clear = far.min(-1) <= 3
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(far.argmin(-1)[clear], target[clear])
        targets.add(target.tobytes())
    assert len(targets) == 20, "no two crops are the same"


def test_mirrored_half_the_time_and_labels_with_the_image():
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    labels = np.arange(32 * 32).reshape(32, 32).astype(np.uint8) // 8
    mirrored = 0
    for seed in range(200):
        im, target = plain(scale=(1.0, 1.0), cat_max_ratio=1.0)(pixels, labels, np.random.default_rng(seed))
        flipped = not np.array_equal(target.numpy(), labels)
        mirrored += flipped
        np.testing.assert_array_equal(target.numpy(), labels[:, ::-1] if flipped else labels)
        np.testing.assert_array_equal(bytes_of(im), pixels[:, ::-1] if flipped else pixels)
    assert 75 < mirrored < 125
    always = plain(scale=(1.0, 1.0), cat_max_ratio=1.0, flip=1.0)(pixels, labels, np.random.default_rng(0))[1]
    np.testing.assert_array_equal(always.numpy(), labels[:, ::-1])


@pytest.mark.parametrize("normalization", ["vit", "deit"])
def test_padding_is_the_mean_colour_and_does_not_count(normalization):
    pixels, labels = checkers(20, 28)
    transform = plain(normalization=normalization, ignore_index=255)
    im, target = transform.finish(pixels, labels)
    mean, std = STATISTICS[normalization]
    expected = (pixels - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(im[:, :20, :28].numpy().transpose(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_array_equal(target[:20, :28].numpy(), labels)
    for tensor, value in ((im, 0), (target, 255)):
        assert (tensor[..., 20:, :] == value).all() and (tensor[..., 28:] == value).all()


def test_ignore_index_of_many_classes():
    labels = np.full((8, 8), 300, np.uint16)
    _, target = plain(crop=16, ignore_index=65535).finish(np.zeros((8, 8, 3), np.uint8), labels)
    assert set(target.unique().tolist()) == {300, 65535}


class TestCrop:
    """Which of ten draws is kept, of an image 20 x 80 with class 0 in the left half and class 1 in the right one."""

    labels = np.repeat(np.array([[0] * 40 + [1] * 40], np.uint8), 20, 0)
    pixels = np.repeat(np.broadcast_to(np.arange(80, dtype=np.uint8), (20, 80))[..., None], 3, -1)  # tell their column

    def left(self, *lefts, labels=labels, **fields):
        """Left side of the crop, 20 x 20, and how many draws it took, when `lefts` are drawn (and 0 from the top)."""
        rng = Draws(1.0, *(value for left in lefts for value in (0, left)), NEVER)
        im, target = plain(crop=20, im_size=20, flip=0.0, **fields)(self.pixels, labels, rng)
        left = int(bytes_of(im)[0, 0, 0])
        np.testing.assert_array_equal(target.numpy(), labels[:, left : left + 20])
        return left, len(lefts) - (len(rng.values) + 1) // 2

    def test_the_first_draw_is_kept_if_it_is_mixed(self):
        assert self.left(30, 0) == (30, 1)

    def test_one_class_alone_is_drawn_again(self):
        assert self.left(0, 60, 30, 0) == (30, 3)

    def test_a_share_of_three_quarters_is_drawn_again(self):
        assert self.left(25, 26, 0) == (26, 2), "15 of 20 columns, then 14"

    def test_the_tenth_draw_is_kept_whatever_it_is(self):
        assert self.left(*[0] * 9, 1, 30) == (1, 10)

    def test_pixels_that_do_not_count_are_no_class_and_no_share(self):
        labels = self.labels.copy()
        labels[:, 30:40] = (
            255  # from 20: class 0 and nothing else; from 26: 4 columns of 0, 6 of 1, 10 that do not count
        )
        assert self.left(20, 26, 0, labels=labels) == (26, 2)
        assert self.left(*[0] * 9, 5, 30, labels=np.full_like(labels, 255)) == (5, 10)

    def test_another_share(self):
        assert self.left(26, 29, 0, cat_max_ratio=0.6) == (29, 2)
        assert self.left(0, 30, cat_max_ratio=1.0) == (0, 1), "1: any crop"

    def test_draws_reach_every_corner(self):
        places = np.arange(22 * 23, dtype=np.uint16).reshape(22, 23)
        transform = plain(crop=20, im_size=22, scale=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, ignore_index=65535)
        pixels = np.zeros((22, 23, 3), np.uint8)
        corners = {transform(pixels, places, np.random.default_rng(i))[1][0, 0].item() for i in range(99)}
        assert corners == {places[top, left] for top in range(3) for left in range(4)}


@pytest.mark.parametrize("shift", [-32.0, -0.4, 17.3, 32.0])
def test_brightness(shift):
    pixels = ramp()
    got = distort(pixels, Draws(0.1, shift, NEVER, 0.1, NEVER, NEVER))
    np.testing.assert_array_equal(got, np.clip(pixels.astype(float) + shift, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.37, 1.5])
def test_contrast_at_either_end(factor, first):
    pixels = ramp()
    coin = 0.1 if first else NEVER
    got = distort(pixels, Draws(NEVER, 0.1, factor, coin, NEVER, NEVER))
    np.testing.assert_array_equal(got, np.clip(pixels * np.float32(factor), 0, 255).astype(np.uint8))
    # and on its side of the other steps
    both = distort(pixels, Draws(NEVER, 0.1, factor, coin, 0.1, 0.5, NEVER))
    alone = distort(got if first else pixels, Draws(NEVER, NEVER, 0.1, 0.1, 0.5, NEVER))
    expected = alone if first else np.clip(alone * np.float32(factor), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(both, expected)


@pytest.mark.parametrize(("saturation", "hue"), [(0.5, None), (1.5, None), (None, 18), (None, -18), (1.2, 7)])
def test_saturation_and_hue_are_those_of_colorsys(saturation, hue):
    """Within the steps of Pillow's HSV: one of its 256 hues changes a channel by up to 6 grey levels."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    draws = [NEVER, NEVER, 0.1]
    draws += [NEVER] if saturation is None else [0.1, saturation]
    draws += [NEVER] if hue is None else [0.1, hue]
    got = distort(pixels, Draws(*draws))
    expected = np.empty(pixels.shape)
    for i in np.ndindex(pixels.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[i] / 255))
        expected[i] = colorsys.hsv_to_rgb((h + (hue or 0) / 180) % 1, min(s * (saturation or 1), 1), v)
    difference = np.abs(got - 255 * expected)
    assert difference.max() <= 12 and difference.mean() < 3
    assert np.abs(got.astype(int) - pixels).mean() > 5, "something was changed"


def test_distortion_as_often_and_as_far_as_the_recipe_says():
    asked = []

    class Spy(Draws):
        def __init__(self, seed):
            self.rng, self.coins = np.random.default_rng(seed), 0

        def random(self):
            value = self.rng.random()
            asked.append(("coin", value < 0.5))
            return value

        def uniform(self, low, high):
            asked.append(((low, high), self.rng.uniform(low, high)))
            return asked[-1][1]

        def integers(self, low, high):
            asked.append((("hue", low, high), int(self.rng.integers(low, high))))
            return asked[-1][1]

    pixels, n = ramp(), 300
    for seed in range(n):
        distort(pixels, Spy(seed))
    coins = [yes for kind, yes in asked if kind == "coin"]
    assert len(coins) == 5 * n and abs(np.mean(coins) - 0.5) < 0.05
    limits = {kind for kind, _ in asked if kind != "coin"}
    assert limits == {(-32, 32), (0.5, 1.5), ("hue", -18, 19)}
    for kind, times in (((-32, 32), 1), ((0.5, 1.5), 2), (("hue", -18, 19), 1)):
        assert abs(sum(k == kind for k, _ in asked) / (times * n) - 0.5) < 0.1


def test_nothing_drawn_changes_nothing():
    pixels = ramp()
    np.testing.assert_array_equal(distort(pixels, Draws(*[NEVER] * 5)), pixels)


def ramp():
    """All grey levels, in colours."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return np.stack([levels, levels[::-1], levels.T], -1)


@pytest.mark.parametrize("size", [(17, 23), (60, 80), (31, 80), (24, 32)])
def test_resizing_is_that_of_interpolate(size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 256, (24, 32), dtype=np.uint8)
    im = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    expected = F.interpolate(im, size, mode="bilinear", align_corners=False, antialias=False)[0].permute(1, 2, 0)
    got = resize_pixels(pixels, size)
    assert got.dtype == np.uint8 and got.shape == (*size, 3)
    assert np.abs(got - expected.numpy()).max() <= 1 + 1e-9
    nearest = F.interpolate(torch.from_numpy(labels)[None, None].double(), size, mode="nearest")[0, 0]
    np.testing.assert_array_equal(resize_labels(labels, size), nearest.numpy())


def test_shrinking_does_not_smooth():
    """With antialiasing, every second column of black and white would become grey."""
    pixels = np.zeros((8, 64, 3), np.uint8)
    pixels[:, ::4] = 255
    got = resize_pixels(pixels, (2, 16))
    reference = np.asarray(Image.fromarray(pixels).resize((16, 2), Image.Resampling.BILINEAR))
    assert np.abs(got.astype(int) - reference).max() > 50
    np.testing.assert_array_equal(got, 0, "each lies between columns 1 and 2 of four, which are black")


def test_the_same_draws_give_the_same_sample_and_others_another():
    pixels, labels = checkers()
    transform = plain(photometric=True)
    first, again, other = (transform(pixels, labels, np.random.default_rng([7, 0, i])) for i in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    np.testing.assert_array_equal(pixels, checkers()[0], "what came in is as it was")


def test_nothing_counts_nowhere():
    im, labels = plain().nothing()
    assert im.shape == (3, 32, 32) and not im.any()
    assert labels.shape == (32, 32) and labels.dtype == torch.int64 and (labels == 255).all()
