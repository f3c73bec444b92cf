"""Reading images: every mode, rotation, hostile files; and normalisation."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.inference.images import NORMALIZATION, ImageError, normalize, read_image, suffixes

BIG = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "GIF": {}, "TIFF": {}, "BMP": {}, "PPM": {}}
LOSSLESS = ("PNG", "WEBP", "TIFF", "BMP", "PPM")


def image(h=23, w=37):
    """No symmetry: rows, columns and channels all differ."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // (w - 1 or 1), y * 255 // (h - 1 or 1), (x * 3 + y * 7) % 256], -1).astype(np.uint8)


def encode(array, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def write(tmp_path, data, name="image.png"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_give_the_pixels_by_str_and_path(tmp_path, format):
    path = write(tmp_path, encode(image(), format, **BIG[format]))
    for source in (path, str(path)):
        got = read_image(source)
        assert got.dtype == np.uint8
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, image())


def test_jpeg_and_gif(tmp_path):
    smooth = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[:, None], 24, 1)[..., None].repeat(3, 2)
    got = read_image(write(tmp_path, encode(smooth, "JPEG", quality=95)))
    assert np.abs(got.astype(int) - smooth).max() <= 6
    np.testing.assert_array_equal(read_image(write(tmp_path, encode(smooth, "GIF"))), smooth)


def test_content_decides_not_the_name(tmp_path):
    np.testing.assert_array_equal(read_image(write(tmp_path, encode(image()), "image.jpg")), image())
    np.testing.assert_array_equal(read_image(write(tmp_path, encode(image()), "picture")), image())


def test_one_list_of_extensions():
    usual = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    assert usual | {".ppm", ".pgm", ".pbm", ".pnm"} <= suffixes()
    assert not {".eps", ".pdf", ".psd", ".ico", ".txt", ""} & suffixes()


def test_one_pixel(tmp_path):
    np.testing.assert_array_equal(read_image(write(tmp_path, encode(np.uint8([[[7, 8, 9]]])))), [[[7, 8, 9]]])


def filled(mode, value):
    return Image.new(mode, (3, 2), value)


SCALAR_MODES = {
    "1": (filled("1", 1), (255, 255, 255)),
    "L": (filled("L", 77), (77, 77, 77)),
    "LA": (filled("LA", (100, 0)), (255, 255, 255)),
    "LA half": (filled("LA", (100, 51)), (224, 224, 224)),  # 0.2 * 100 + 0.8 * 255
    "La": (filled("La", (20, 51)), (224, 224, 224)),
    "RGB": (filled("RGB", (1, 2, 3)), (1, 2, 3)),
    "RGBX": (filled("RGBX", (1, 2, 3, 0)), (1, 2, 3)),
    "RGBA opaque": (filled("RGBA", (1, 2, 3, 255)), (1, 2, 3)),
    "RGBA": (filled("RGBA", (200, 0, 50, 51)), (244, 204, 214)),
    "RGBa": (filled("RGBa", (40, 0, 10, 51)), (244, 204, 214)),
    "CMYK": (filled("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (filled("YCbCr", (128, 128, 128)), (128, 128, 128)),
    "YCbCr red": (filled("YCbCr", (76, 85, 255)), (254, 0, 0)),
    "HSV": (filled("HSV", (85, 255, 200)), (0, 200, 0)),
    "LAB white": (filled("LAB", (255, 128, 128)), (255, 255, 255)),  # 128 is neutral
    "LAB gray": (filled("LAB", (137, 128, 128)), (128, 128, 128)),
    "I;16": (filled("I;16", 257 * 90), (90, 90, 90)),
    "I;16B": (Image.fromarray(np.full((2, 3), 257 * 90, ">u2")), (90, 90, 90)),
    "I 8 bit": (filled("I", 90), (90, 90, 90)),
    "I 16 bit": (filled("I", 257 * 90), (90, 90, 90)),
}


@pytest.mark.parametrize(("image", "expected"), SCALAR_MODES.values(), ids=SCALAR_MODES)
def test_pil_modes(image, expected):
    got = read_image(image)
    assert got.shape == (2, 3, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1, got[0, 0]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.uint8([[0, 1, 2]]), "L")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    np.testing.assert_array_equal(read_image(image), expected)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=1)
    expected[0][1] = [255, 255, 255]
    np.testing.assert_array_equal(read_image(write(tmp_path, buffer.getvalue())), expected)
    image.putalpha(Image.fromarray(np.uint8([[255, 0, 255]])))
    np.testing.assert_array_equal(read_image(image.convert("PA")), expected)


def test_sixteen_bits_do_not_saturate(tmp_path):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for source in (write(tmp_path, encode(values)), values, torch.from_numpy(values.astype(np.int32)).to(torch.uint16)):
        got = read_image(source)
        np.testing.assert_array_equal(got[..., 0], np.round(values / 257))
        np.testing.assert_array_equal(got[..., 0], got[..., 2])
        assert (got == 255).mean() < 0.01
    assert read_image(np.uint16([[65535]])).max() == 255


def test_wide_integers_are_stretched_over_their_range():
    got = read_image(Image.fromarray(np.int32([[-100_000, 0, 100_000]])))
    np.testing.assert_array_equal(got[0, :, 0], [0, 128, 255])


def test_float_mode_is_refused():
    with pytest.raises(ImageError, match='mode "F"'):
        read_image(Image.new("F", (3, 2), 0.5))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(tmp_path, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:8, :8] = 255  # a white corner, so that JPEG can be told too
    path = write(tmp_path, encode(stored, format, exif=exif, **BIG[format]))
    got, expected = read_image(path), UPRIGHT[orientation](stored)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= 40
    assert expected.std() > 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"garbage", b"II*\0\x08\0\0\0\xff\xff\0"])
def test_damaged_exif_does_not_cost_the_image(tmp_path, exif):
    path = write(tmp_path, encode(image(), "PNG", exif=b"Exif\0\0" + exif))
    np.testing.assert_array_equal(read_image(path), image())


def test_rotation_is_applied_although_other_exif_tags_make_no_sense(tmp_path):
    rotate = struct.pack("<HHII", 0x0112, 3, 1, 6)
    nonsense = struct.pack("<HHII", 0x829A, 5, 1, 0xFFFFFF)  # exposure time, stored far behind the end
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + rotate + nonsense + struct.pack("<I", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = read_image(write(tmp_path, encode(image(), "PNG", exif=exif)))
    np.testing.assert_array_equal(got, np.rot90(image(), -1))


def test_animation_gives_the_first_frame_and_a_warning(tmp_path):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "TIFF"):
        path = tmp_path / "animation"
        frames[0].save(
            path, format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
        )
        with pytest.warns(UserWarning, match="only the first is used"):
            got = read_image(path)
        np.testing.assert_array_equal(got, np.full((3, 4, 3), (255, 0, 0)))


def test_current_frame_of_a_pil_animation_is_left_alone(tmp_path):
    path = tmp_path / "animation"
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(path)
    image.seek(1)
    np.testing.assert_array_equal(read_image(image)[0, 0], (0, 0, 255))
    assert image.tell() == 1


A = image()
ARRAYS = {
    "uint8": (A, A),
    "gray": (A[..., 0], A[..., :1].repeat(3, 2)),
    "one channel": (A[..., :1], A[..., :1].repeat(3, 2)),
    "alpha": (np.dstack([A, np.full(A.shape[:2], 255, np.uint8)]), A),
    "transparent": (np.dstack([A, np.zeros(A.shape[:2], np.uint8)]), np.full_like(A, 255)),
    "bool": (A[..., 0] > 99, (A[..., :1] > 99).repeat(3, 2) * 255),
    "float": (A / 255, A),
    "float32": ((A / 255).astype(np.float32), A),
    "strided": (np.asfortranarray(A)[::2, ::-1], A[::2, ::-1]),
    "big endian": (A.astype(">u2") * 257, A),
    "3 rows": (A[:3], A[:3]),  # arrays are channel-last always
    ">u2": ((A.astype(np.uint16) * 257).astype(">u2"), A),
    ">f4": ((A / 255).astype(">f4"), A),
    ">f8": ((A / 255).astype(">f8"), A),
    "float16": ((A[..., 0] > 99).astype(np.float16), (A[..., :1] > 99).repeat(3, 2) * 255),
    "negative strides": (A[::-1, ::-1, ::-1], A[::-1, ::-1, ::-1]),
    "one row for all": (np.broadcast_to(A[:1], A.shape), np.broadcast_to(A[:1], A.shape)),
    "matrix": (A[..., 0].view(np.matrix), A[..., :1].repeat(3, 2)),
    "mask of nothing": (np.ma.array(A, mask=np.zeros(A.shape, bool)), A),
}
T = torch.from_numpy(A)
TENSORS = {
    "CHW": (T.permute(2, 0, 1), A),
    "HWC": (T, A),
    "HW": (T[..., 0], A[..., :1].repeat(3, 2)),
    "1HW": (T[None, ..., 0], A[..., :1].repeat(3, 2)),
    "4HW": (torch.cat([T, torch.full_like(T[..., :1], 255)], 2).permute(2, 0, 1), A),
    "4 rows": (T[:4], A[:4]),
    "3 x 5 x 3": (T[:3, :5], A[:3, :5].transpose(1, 2, 0)),  # documented: the first axis is the channel
    "float": (T.permute(2, 0, 1) / 255, A),
    "bool": (T[..., 0] > 99, (A[..., :1] > 99).repeat(3, 2) * 255),
    "gradient": ((T / 255).requires_grad_(), A),
    "negative bit": (torch._neg_view(-(T / 255)), A),
    "expanded": (T[:1].expand(23, -1, -1), np.broadcast_to(A[:1], A.shape)),
    "parameter": (torch.nn.Parameter(T / 255), A),
    "inference": (torch.inference_mode()(lambda: (T / 255).clone())(), A),
}


@pytest.mark.parametrize(("source", "expected"), [*ARRAYS.values(), *TENSORS.values()], ids=[*ARRAYS, *TENSORS])
def test_arrays_and_tensors(source, expected):
    got = read_image(source)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, expected)


class Odd(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("no such thing")


class OddImage(Image.Image):
    size = property(lambda self: (_ for _ in ()).throw(OSError("no size")))


def closed():
    image = Image.new("RGB", (3, 2))
    image.close()
    return image


ODD = {  # whatever is asked for an image: ImageError, never another exception
    "meta": lambda: torch.empty(3, 4, 4, device="meta"),
    "sparse": lambda: torch.zeros(4, 4).to_sparse(),
    "sparse csr": lambda: torch.zeros(4, 4).to_sparse_csr(),
    "mkldnn": lambda: torch.zeros(3, 4, 4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(4, 4)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(4, 4)], layout=torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3, 4, 4), 0.1, 0, torch.quint8),
    "subclass": lambda: torch.zeros(3, 4, 4).as_subclass(Odd),
    "uninitialised": torch.nn.parameter.UninitializedParameter,
    "conjugate": lambda: torch.zeros(3, 4, 4, dtype=torch.complex64).conj(),
    "imaginary, negative": lambda: torch.zeros(3, 4, 4, dtype=torch.complex64).conj().imag.to(torch.int32),
    **{str(dtype): lambda dtype=dtype: torch.zeros(3, 4, 4).to(dtype) for dtype in (
        torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8, torch.int64, torch.uint32)},
    "scalar": lambda: torch.tensor(0.5),
    "empty": lambda: torch.zeros(3, 0, 4),
    "masked": lambda: np.ma.array(A, mask=A > 250),
    "record": lambda: np.zeros((4, 4), [("r", "u1"), ("g", "u1")]),
    "times": lambda: np.zeros((4, 4), "M8[s]"),
    "texts": lambda: np.full((4, 4), "0"),
    "complex": lambda: np.zeros((4, 4), complex),
    "number": lambda: np.uint8(3),
    "list": lambda: A.tolist(),
    "dict": dict,
    "no size": OddImage,
    "closed": closed,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ODD)
def test_odd_images_raise_image_errors(what):
    with pytest.raises(ImageError) as caught:
        read_image(ODD[what]())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_no_image_error(interrupt):
    class Interrupted(Image.Image):
        def load(self):
            raise interrupt

    image = Interrupted()
    image._size, image._mode = (4, 4), "RGB"
    with pytest.raises(interrupt):
        read_image(image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors(dtype):
    got = read_image((T / 255).to(dtype))
    assert np.abs(got.astype(int) - A).max() <= 1


def test_result_is_not_shared_with_the_source():
    source = image()
    read_image(source)[:] = 0
    assert source.any()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"got shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"got shape \(4, 4, 2\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got shape \(1, 4, 4, 3\)"),
        (np.zeros(4, np.uint8), r"got shape \(4, 1\)|got shape \(4,\)"),
        (torch.zeros(2, 3, 8, 8), r"got shape \(2, 3, 8, 8\)"),
        (np.zeros((4, 4), np.int64), "int64 is ambiguous"),
        (np.zeros((4, 4), object), "object is ambiguous"),
        (np.full((4, 4), 1.5), r"0\.\.1, found 1\.5"),
        (np.full((4, 4), -0.1), r"0\.\.1, found -0\.1"),
        (np.full((4, 4), np.nan), "found nan"),
        (normalize(A, "vit"), r"0\.\.1, found -1"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (b"image.png", "not bytes"),
        (None, "not NoneType"),
    ],
)
def test_unusable_sources(source, message):
    with pytest.raises(ImageError, match=message):
        read_image(source)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # opening it would block for ever
    cases = {
        "missing.png": "No such file",
        "loop": "symbolic link",
        "pipe": "is no regular file",
        ".": "is a folder",
        "empty.png": "the file is empty",
        "text.png": "not an image, or not one of JPEG, PNG",
        "program.eps": "not an image, or not one of JPEG, PNG",  # Pillow would start Ghostscript
    }
    write(tmp_path, b"", "empty.png")
    write(tmp_path, b"hello, I am no image at all", "text.png")
    write(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "program.eps")
    for name, message in cases.items():
        path = str(tmp_path / name)
        with pytest.raises(ImageError, match=message) as caught:
            read_image(path)
        assert path in str(caught.value), "the message names the file"
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="null"):
        read_image("a\0b.png")


def png_header(width, height):
    """A PNG that ends after saying how large it is."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 10_000, 40_000])
def test_bombs_are_refused_by_their_header(tmp_path, side):
    """Pillow itself is silent, warns and raises at these sizes; there is no pixel data, so nothing was decoded."""
    idat = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path = write(tmp_path, png_header(side, side) + idat)
    with pytest.raises(ImageError, match="limit"):
        read_image(path)


def test_pixel_limit_is_an_argument(tmp_path):
    path = write(tmp_path, encode(image(10, 10)))
    assert read_image(path, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="10 x 10 pixels are more than the limit of 99"):
        read_image(path, max_pixels=99)
    with pytest.raises(ImageError, match="limit of 99"):
        read_image(Image.fromarray(image(10, 10)), max_pixels=99)


@pytest.mark.parametrize("format", BIG)
def test_truncated_files_are_refused(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    data = encode(noise, format, **BIG[format])
    for part in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        path = write(tmp_path, data[: int(len(data) * part)])
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert str(path) in str(caught.value)


def test_lazy_pil_image_of_a_truncated_file(tmp_path):
    data = encode(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image = Image.open(write(tmp_path, data[: len(data) // 2]))
    with pytest.raises(ImageError, match="cannot decode the PIL image: .*truncated"):
        read_image(image)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_give_an_image_or_an_image_error(tmp_path):
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for i in range(210):
        format = ("PNG", "JPEG", "GIF")[i % 3]
        data = bytearray(encode(image(), format))
        for position in rng.integers(0, len(data), rng.integers(1, 12)):
            data[position] = rng.integers(256)
        if i % 10 == 0:
            data = data[: rng.integers(1, len(data))]
        try:
            got = read_image(write(tmp_path, bytes(data)))
            assert got.dtype == np.uint8
            assert got.ndim == 3
            outcomes["read"] += 1
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) >= 20, outcomes


@pytest.mark.parametrize("stats", NORMALIZATION)
def test_normalize_with_exact_statistics(stats):
    mean, std = np.float64(NORMALIZATION[stats])
    expected = ((A / 255 - mean) / std).transpose(2, 0, 1)
    got = normalize(A, stats)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert np.abs(got.numpy() - expected).max() < 2e-6


@pytest.mark.parametrize(
    ("stats", "mean", "std"),
    [("vit", (127.5,) * 3, (127.5,) * 3), ("deit", (123.68, 116.28, 103.53), (58.4, 57.12, 57.38))],
)
def test_normalize_with_rounded_statistics(stats, mean, std):
    expected = ((A - np.float64(mean)) / std).transpose(2, 0, 1)
    got = normalize(A, stats, rounded=True)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() < 2e-6
    if stats == "deit":
        assert np.abs(got.numpy() - normalize(A, stats).numpy()).max() > 1e-5


def test_normalize_takes_arrays_that_cannot_be_written():
    image = np.array([[[255, 0, 51]]], np.uint8)  # one pixel: contiguous in any order, so not copied on the way
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(normalize(image, "vit")[:, 0, 0], [1, -1, -0.6], rtol=1e-6)


def test_normalize_refuses_other_things():
    with pytest.raises(ValueError, match="choose one of vit, deit"):
        normalize(A, "imagenet")
    for wrong in (A.astype(np.float32), A[..., 0], A.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
            normalize(wrong, "vit")
