"""TIFF files of every kind, written by hand (tiff_files.py): images and labels are right, or refused by name."""

import itertools

import numpy as np
import pytest
from PIL import Image

from segmenter.data.label_files import DataError, read_ids
from segmenter.inference.images import ImageError, read_image
from tests.support.tiff_files import tiff

H, W = 20, 30
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
SAMPLES = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}  # photometric interpretation -> samples a pixel
COLORS = np.random.default_rng(1).integers(0, 65536, (3, 256))


def stored(bits, n=1, seed=0):
    return np.random.default_rng(seed).integers(0, 2 ** min(bits, 16), (H, W, n))


def write(tmp_path, data):
    (tmp_path / "a.tif").write_bytes(data)
    return tmp_path / "a.tif"


def expected_image(samples, bits, photometric, extra):
    """RGB in floats, 0..255, by the specification."""
    shares = samples / (2**bits - 1) * 255
    colors = {
        0: lambda: 255 - shares[..., :1],
        1: lambda: shares[..., :1],
        2: lambda: shares[..., :3],
        3: lambda: (COLORS[:, samples[..., 0]] // 256).transpose(1, 2, 0),
        5: lambda: (255 - shares[..., :3]) * (255 - shares[..., 3:4]) / 255,
    }[photometric]()
    if extra == (2,):
        alpha = shares[..., -1:] / 255
        colors = colors * alpha + 255 * (1 - alpha)
    return np.broadcast_to(colors, (H, W, 3))


KINDS = [(bits, photometric, extra) for bits, photometric, extra in itertools.product(
    (1, 2, 4, 8, 12, 16), (0, 1, 2, 3, 5), ((), (0,), (2,))) if not (photometric == 3 and bits > 8)]  # fmt: skip
STORAGE = [dict(zip(("order", "planar", "deflate", "fill_order"), values, strict=True))
           for values in itertools.product("<>", (None, 2), (False, True), (None, 2))]  # fmt: skip
ALSO = [{"orientation": 6}, {"rows": 7, "orientation": 3}, {"tile": 16}, {"big": True, "orientation": 5}]


def files(kinds):
    """(kind, samples as stored, their file, orientation) of each kind, in every storage; each of ALSO with some."""
    for first, (bits, photometric, extra) in enumerate(kinds):
        samples = stored(bits, SAMPLES[photometric] + len(extra))
        colors = COLORS[:, : 2**bits] if photometric == 3 else None
        for i, storage in enumerate(STORAGE, first):
            more = ALSO[i % len(ALSO)]
            data = tiff(samples, bits, photometric, extra=extra, colormap=colors, **storage, **more)
            yield (bits, photometric, extra), samples, data, {**storage, **more}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow, of big-endian BigTIFFs
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_images_are_right_or_refused(tmp_path, bits):
    read = set()
    for kind, samples, data, how in files([kind for kind in KINDS if kind[0] == bits]):
        try:
            got = read_image(write(tmp_path, data))
        except ImageError:
            continue
        expected = UPRIGHT[how.get("orientation", 1)](expected_image(samples, *kind))
        assert got.shape == expected.shape, (kind, how)
        assert np.abs(got - expected).max() <= (2 if kind[1] == 5 or kind[2] else 1), (kind, how)
        read.add(kind)
    usual = {(8, p, ()) for p in (0, 1, 2, 3, 5)} | {(8, 2, (0,)), (8, 2, (2,)), (8, 1, (2,))}
    usual |= {(16, p, ()) for p in (0, 1, 2, 5)} | {(12, 1, ())} | {(b, p, ()) for b in (1, 2, 4) for p in (0, 1, 3)}
    assert {kind for kind in usual if kind[0] == bits} <= read


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow, of big-endian BigTIFFs
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_ids_are_the_stored_values_or_refused(tmp_path, bits):
    read = set()
    for kind, samples, data, how in files([kind for kind in KINDS if kind[0] == bits]):
        try:
            got = read_ids(write(tmp_path, data))
        except DataError:
            continue
        assert kind[1] in (1, 3), "neither colours nor inverted greys"
        assert not kind[2], "one sample a pixel"
        np.testing.assert_array_equal(got, UPRIGHT[how.get("orientation", 1)](samples[..., 0]), err_msg=str(how))
        read.add(kind)
    assert {(bits, 1, ())} | ({(bits, 3, ())} if bits <= 8 else set()) <= read


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
@pytest.mark.parametrize("by", ["path", "image"])
def test_uncompressed_files_are_turned_not_scrambled(tmp_path, orientation, mode, by):
    """Which Pillow does if it is given their name; also where the caller did so."""
    bits, photometric, extra = {"L": (8, 1, ()), "P": (8, 3, ()), "RGBA": (8, 2, (2,)), "I;16": (16, 1, ()),
                                "1": (1, 1, ())}[mode]  # fmt: skip
    samples = stored(bits, SAMPLES[photometric] + len(extra))
    path = write(tmp_path, tiff(samples, bits, photometric, extra=extra, orientation=orientation, colormap=(
        COLORS if mode == "P" else None)))  # fmt: skip
    with Image.open(path) as image:
        got = read_image(path if by == "path" else image)
    expected = UPRIGHT[orientation](expected_image(samples, bits, photometric, extra))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 2
    if not extra:
        np.testing.assert_array_equal(read_ids(path), UPRIGHT[orientation](samples[..., 0]))


IDS = np.arange(H * W).reshape(H, W) % 300
WIDE = {
    "float": {"samples": IDS.astype(np.float32), "bits": 32, "sample_format": 3},
    "float, big-endian": {"samples": IDS.astype(np.float32), "bits": 32, "sample_format": 3, "order": ">"},
    "float, deflate": {"samples": IDS.astype(np.float32), "bits": 32, "sample_format": 3, "deflate": True},
    "unsigned 32": {"samples": IDS, "bits": 32},
    "signed 32": {"samples": IDS, "bits": 32, "sample_format": 2},
    "signed 32, big-endian": {"samples": IDS, "bits": 32, "sample_format": 2, "order": ">"},
    "signed 16": {"samples": IDS, "bits": 16, "sample_format": 2},
    "signed 16, big-endian": {"samples": IDS, "bits": 16, "sample_format": 2, "order": ">"},
    "signed 8": {"samples": IDS % 100, "bits": 8, "sample_format": 2},
    "16, predictor": {"samples": IDS, "bits": 16, "predictor": 2, "deflate": True},
    "16, big-endian, predictor": {"samples": IDS, "bits": 16, "predictor": 2, "deflate": True, "order": ">"},
}


@pytest.mark.parametrize("kind", WIDE)
def test_ids_of_wide_and_signed_samples(tmp_path, kind):
    path = write(tmp_path, tiff(**WIDE[kind]))
    np.testing.assert_array_equal(read_ids(path), WIDE[kind]["samples"])
    if "predictor" not in kind:  # an image of unknown range
        with pytest.raises(ImageError, match="no known range; convert to 8 or 16 bit"):
            read_image(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": IDS + 0.5, "bits": 32, "sample_format": 3}, "floating point values that are not whole"),
        ({"samples": np.where(IDS == 7, np.nan, IDS), "bits": 32, "sample_format": 3}, "floating point values"),
        ({"samples": np.where(IDS == 7, np.inf, IDS), "bits": 32, "sample_format": 3}, "beyond 16 bits"),
        (
            {"samples": IDS + 70_000.0, "bits": 32, "sample_format": 3},
            r"values 70000\.0\.\.70299\.0 are beyond 16 bits",
        ),
        ({"samples": IDS + 2**32 - 300, "bits": 32}, r"values 4294966996\.\.4294967295 are beyond 16 bits"),
        ({"samples": IDS - 1, "bits": 32, "sample_format": 2}, r"values -1\.\.298 are beyond 16 bits"),
        ({"samples": IDS - 1, "bits": 16, "sample_format": 2}, r"values -1\.\.298 are beyond 16 bits"),
        ({"samples": IDS % 100 - 1, "bits": 8, "sample_format": 2}, r"values -1\.\.98 are beyond 16 bits"),
        (
            {"samples": IDS, "bits": 16, "sample_format": 2, "order": ">", "deflate": True},
            "other byte order, compressed",
        ),
        (
            {"samples": IDS, "bits": 32, "sample_format": 2, "order": ">", "deflate": True},
            "other byte order, compressed",
        ),
        (
            {"samples": IDS % 9, "photometric": 0},
            "0 is white: ids could be the values that are stored or their inverse",
        ),
        ({"samples": IDS % 2, "bits": 1, "photometric": 0, "deflate": True}, "0 is white"),
        ({"samples": IDS, "bits": 16, "photometric": 0}, "0 is white"),
        ({"samples": IDS % 9, "tags": [(262, None)]}, "does not say whether 0 is black or white"),
        ({"samples": stored(8, 2), "extra": (0,)}, "holds 2 samples|rare kind"),
        ({"samples": stored(8, 2), "extra": (2,)}, "holds alpha"),
        ({"samples": stored(8, 3), "photometric": 2}, "holds colours"),
    ],
)
def test_what_holds_no_ids_is_refused(tmp_path, options, message):
    if options.get("sample_format") == 3:
        options["samples"] = options["samples"].astype(np.float32)
    path = write(tmp_path, tiff(**options))
    with pytest.raises(DataError, match=message) as caught:
        read_ids(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "colour" not in str(caught.value) or "colours" in message or "samples" in message or "alpha" in message


@pytest.mark.parametrize(
    "tags",
    [
        [(273, 4, [500, 700])],  # fewer strips than there are rows for
        [(273, 4, [500, 700, 900, 1000])],  # more, which would be laid over the first
        [(273, 4, [500, 0, 700])],  # GDAL's way of saying that a part was never written
        [(278, 4, [5])],
    ],
)
@pytest.mark.parametrize("deflate", [False, True])
def test_missing_parts_are_not_taken_for_black(tmp_path, tags, deflate):
    data = tiff(np.full((H, W), 9), rows=7, deflate=deflate, tags=tags)
    assert (read_image(write(tmp_path, tiff(np.full((H, W), 9), rows=7, deflate=deflate))) == 9).all()
    for read, error in ((read_image, ImageError), (read_ids, DataError)):
        with pytest.raises(error):
            read(write(tmp_path, data))


def test_dark_images_keep_their_depth(tmp_path):
    """How bright an image is does not depend on its brightest pixel."""
    for order in "<>":
        got = read_image(write(tmp_path, tiff(np.full((H, W), 200), 16, order=order)))
        assert (got == 1).all()
    assert (read_image(write(tmp_path, b"P5 2 1 65535\n" + b"\0\xc8" * 2)) == 1).all()
    assert (read_image(write(tmp_path, tiff(np.full((H, W), 4095), 12))) == 255).all()


def test_palettes_of_8_bits(tmp_path):
    """Some programs write 0..255 where the specification has 0..65535."""
    samples = stored(8)
    got = read_image(write(tmp_path, tiff(samples, photometric=3, colormap=COLORS // 256)))
    np.testing.assert_array_equal(got, (COLORS[:, samples[..., 0]] // 256).transpose(1, 2, 0))


def test_ycbcr(tmp_path):
    pixels = stored(8, 3).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB")).astype(int)
    path = write(tmp_path, tiff(pixels, photometric=6, tags=[(530, 3, [1, 1])]))
    try:
        assert np.abs(read_image(path) - expected).max() <= 1
    except ImageError as error:  # older versions of Pillow
        assert "truncated" in str(error)
    for tags in ([], [(530, 3, [2, 2])], [(530, 3, [2, 1])]):  # two rows or columns share a colour
        with pytest.raises(ImageError, match="fewer samples than pixels"):
            read_image(write(tmp_path, tiff(pixels, photometric=6, tags=tags)))
