"""Files as programs leave them: PNGs full of texts, BMPs, GIFs, pipes; read as images and as labels."""

import contextlib
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from segmenter.data.label_files import DataError, read_ids
from segmenter.inference import image_files
from segmenter.inference.images import ImageError, read_image

IDS = np.arange(6 * 10).reshape(6, 10) % 7


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, depth=8, color=0, before=(), after=()):
    """A PNG by hand: values (H, W) or (H, W, samples), chunks before and after the pixels."""
    values = np.atleast_3d(values)
    h, w, _ = values.shape
    bits = (values.reshape(h, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(h, -1).astype(np.uint8), axis=1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, 0))
    halves = [chunk(b"IDAT", pixels[:7]), chunk(b"IDAT", pixels[7:])]
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *before, *halves, *after, chunk(b"IEND", b"")])


def write(tmp_path, data, name="a.png"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


HUGE = zlib.compress(b"node " * 1_000_000)
BOMB = zlib.compress(bytes(50_000_000))
XMP = b'<x:xmpmeta tiff:Orientation="6"/>'
PLAIN = {  # chunks that say nothing about the pixels
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + HUGE),
    "tEXt": chunk(b"tEXt", b"prompt\0" + b"x" * 3_000_000),
    "iTXt": chunk(b"iTXt", b"history\0\1\0\0\0" + HUGE),
    "iTXt of XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x:xmpmeta/>" + b" " * 3_000_000)),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + HUGE),
    "a bomb": chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "a damaged text": chunk(b"zTXt", b"Raw profile type exif\0\0garbage"),
    "a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "a private one": chunk(b"prVt", bytes(2_000_000)),
    "70 of 1 MB": chunk(b"tEXt", b"prompt\0" + b"x" * 1_000_000) * 70,
}


@pytest.mark.parametrize("what", PLAIN)
@pytest.mark.parametrize("where", ["before", "after"])
def test_texts_and_profiles_do_not_cost_a_png(tmp_path, what, where):
    path = write(tmp_path, png(IDS, **{where: [PLAIN[what]]}))
    tracemalloc.start()
    np.testing.assert_array_equal(read_image(path)[..., 0], IDS)
    np.testing.assert_array_equal(read_ids(path), IDS)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("padding", [0, 3_000_000])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("where", ["before", "after"])
def test_an_orientation_in_a_text_counts(tmp_path, padding, compressed, where):
    """Where Adobe's programs and ImageMagick write it."""
    xmp = XMP + b" " * padding
    text = b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" + zlib.compress(xmp) if compressed else b"\0\0\0\0" + xmp)
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = b"\nexif\n" + b"%8d\n" % 100 + exif.tobytes().hex().encode()
    of_magick = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))
    for turned in (chunk(b"iTXt", text), of_magick):
        path = write(tmp_path, png(IDS, **{where: [turned]}))
        np.testing.assert_array_equal(read_image(path)[..., 0], np.rot90(IDS, -1))
        np.testing.assert_array_equal(read_ids(path), np.rot90(IDS, -1))


def test_labels_are_turned_as_images_are(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(IDS.astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), read_image(tmp_path / "a.png")[..., 0])
        assert image_files.orientation(tmp_path / "a.png") == orientation
        assert read_ids(tmp_path / "a.png").shape == ((10, 6) if orientation > 4 else (6, 10))


def test_a_png_chunk_of_a_made_up_length_reserves_nothing(tmp_path):
    data = bytearray(png(np.zeros((2, 3), np.uint8)))
    at = data.index(b"IDAT")
    data[at - 4 : at] = b"\xff" * 4
    path = write(tmp_path, bytes(data))
    tracemalloc.start()
    try:
        with contextlib.suppress(ImageError):  # Pillow may find all it needs
            read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_pngs_of_many_chunks(tmp_path, monkeypatch):
    path = write(tmp_path, png(IDS, before=[chunk(b"tEXt", b"")] * 50))
    np.testing.assert_array_equal(read_ids(path), IDS)
    monkeypatch.setattr(image_files, "_MAX_CHUNKS", 40)
    with pytest.raises(ImageError, match="more than 40 chunks"):
        read_image(path)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_greys_of_a_png_and_the_one_that_is_transparent(tmp_path, depth):
    values = np.arange(60).reshape(6, 10) * 7919 % 2**depth
    clear = int(values[2, 3])
    grey = np.round(values / (2**depth - 1) * 255)
    path = write(tmp_path, png(values, depth))
    np.testing.assert_array_equal(read_image(path)[..., 1], grey)
    np.testing.assert_array_equal(read_ids(path), values)
    path = write(tmp_path, png(values, depth, before=[chunk(b"tRNS", struct.pack(">H", clear))]))
    np.testing.assert_array_equal(read_image(path)[..., 1], np.where(values == clear, 255, grey))
    np.testing.assert_array_equal(read_ids(path), values)


def test_colours_of_a_png_and_the_one_that_is_transparent(tmp_path):
    values = np.arange(180).reshape(6, 10, 3) * 7919 % 256
    clear = values[2, 3]
    path = write(tmp_path, png(values, 8, 2, before=[chunk(b"tRNS", struct.pack(">3H", *clear))]))
    np.testing.assert_array_equal(read_image(path), np.where((values == clear).all(-1, keepdims=True), 255, values))
    path = write(tmp_path, png(values * 257, 16, 2))
    np.testing.assert_array_equal(read_image(path), values)
    path = write(tmp_path, png(values * 257, 16, 2, before=[chunk(b"tRNS", struct.pack(">3H", *clear))]))
    with pytest.raises(ImageError, match="16-bit colours of which one is transparent"):
        read_image(path)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_indices_of_a_png_are_ids_whatever_its_colours(tmp_path, depth):
    values = np.arange(60).reshape(6, 10) % 2**depth
    for palette in (
        bytes(3 * 2**depth),
        bytes(range(256))[::-1] * 3,
        b"".join(bytes([i] * 3) for i in range(2**depth)),
    ):
        colors = [chunk(b"PLTE", palette[: 3 * 2**depth]), chunk(b"tRNS", b"\0\x80")]
        np.testing.assert_array_equal(read_ids(write(tmp_path, png(values, depth, 3, before=colors))), values)


@pytest.mark.parametrize(("color", "samples", "what"), [(4, 2, "alpha"), (2, 3, "colours"), (6, 4, "colours")])
@pytest.mark.parametrize("depth", [8, 16])
def test_pngs_of_several_samples_hold_no_ids(tmp_path, color, samples, what, depth):
    path = write(tmp_path, png(np.full((6, 10, samples), 5), depth, color))
    with pytest.raises(DataError, match=what if depth == 8 else "alpha|colours"):
        read_ids(path)


def bmp(values, bits, palette, compression=0):
    """A BMP by hand; palette (n, 3)."""
    h, w = values.shape
    ones = (values[::-1, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(ones.reshape(h, -1).astype(np.uint8), axis=1)
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 4)])
    if compression:  # RLE8: each pixel a run of its own
        rows = np.frombuffer(b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in values[::-1]), np.uint8)
    colors = b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    at = 54 + len(colors)
    size = (len(rows.tobytes()), 2835, 2835, len(palette), 0)
    head = struct.pack("<2sIHHI", b"BM", at + size[0], 0, 0, at)
    return head + struct.pack("<IiiHHIIiiII", 40, w, h, 1, bits, compression, *size) + colors + rows.tobytes()


@pytest.mark.parametrize("width", [1, 3, 10, 33])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("colors", [1, 2, 3, 7, 16, 256])
@pytest.mark.parametrize("rle", [0, 1])
def test_bmps_of_greys_are_right_or_refused(tmp_path, width, bits, colors, rle):
    if colors > 2**bits or (rle and bits != 8):
        return
    values = np.arange(5 * width).reshape(5, width) % colors
    ramp = np.repeat(np.arange(colors)[:, None], 3, 1)
    black_white = np.array([[0] * 3, [255] * 3])
    read = 0
    for palette in (ramp, black_white, 255 - ramp, ramp * [1, 0, 2] % 256):
        palette = palette[:colors]
        if len(palette) < colors:
            continue
        path = write(tmp_path, bmp(values, bits, palette, rle), "a.bmp")
        for reader, error, expected in ((read_ids, DataError, values), (read_image, ImageError, palette[values])):
            try:
                got = reader(path)
            except error as reason:
                assert "BMP" in str(reason)
            else:
                np.testing.assert_array_equal(got, expected)
                read += 1
    assert read >= (4 if colors > 1 else 2)


def test_a_gif_that_stores_some_pixels_holds_no_ids(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(IDS.astype(np.uint8)).save(buffer, "GIF")
    path = write(tmp_path, buffer.getvalue(), "a.gif")
    np.testing.assert_array_equal(read_ids(path), IDS)
    data = bytearray(buffer.getvalue())
    data[6] += 4  # the screen is wider than the image
    with pytest.raises(DataError, match="does not store all of its pixels"):
        read_ids(write(tmp_path, bytes(data), "a.gif"))
    palette = Image.fromarray(IDS.astype(np.uint8), "L")
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    palette.save(path, transparency=2)
    np.testing.assert_array_equal(read_ids(path), IDS)


def test_labels_are_regular_files_within_the_limit(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"pipe": "is no regular file", ".": "is a folder", "none.png": "No such file"}.items():
        with pytest.raises(DataError, match=message) as caught:
            read_ids(tmp_path / name)
        assert caught.value.file == tmp_path / name
    huge = png(IDS).replace(png(IDS)[8:33], chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)))
    with pytest.raises(DataError, match="limit|bomb"):
        read_ids(write(tmp_path, huge))


FORMATS = {"PNG": {}, "JPEG": {}, "GIF": {}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}, "WEBP": {}, "PPM": {}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", FORMATS)
def test_mutated_files_are_read_or_refused(tmp_path, format):
    """Nothing but ImageError and DataError comes out, and what is read has its types."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    values = np.stack([IDS] * 3, -1) if format in ("JPEG", "WEBP") else IDS
    Image.fromarray(values.astype(np.uint8)).save(buffer, format, **FORMATS[format])
    outcomes = {"read": 0, "refused": 0}
    for i in range(150):
        data = bytearray(buffer.getvalue())
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path = write(tmp_path, bytes(data[: rng.integers(8, len(data))] if i % 7 == 0 else data), "a")
        for reader, error, types in ((read_image, ImageError, "B"), (read_ids, DataError, "BH")):
            try:
                got = reader(path)
            except error as reason:
                assert str(path) in str(reason)
                outcomes["refused"] += 1
            else:
                assert got.dtype.char in types
                assert got.size
                outcomes["read"] += 1
    assert min(outcomes.values()) >= 5, outcomes


def test_the_limits_of_pillow_stay_as_they_are(tmp_path):
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    read_image(write(tmp_path, png(IDS, before=[PLAIN["zTXt"]])))
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_images_are_opened_in_one_place():
    texts = [path.read_text(encoding="utf-8") for path in Path(image_files.__file__).parent.rglob("*.py")]
    assert sum(text.count("Image.open(") for text in texts) == 1
