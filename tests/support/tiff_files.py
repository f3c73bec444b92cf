"""TIFF files written by hand, as the specification has them: what the readers of images and labels are held to."""

import struct
import zlib

import numpy as np

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}


def tiff(
    samples,
    bits=8,
    photometric=1,
    order="<",
    sample_format=None,
    extra=(),
    planar=None,
    deflate=False,
    fill_order=None,
    orientation=None,
    rows=None,
    tile=None,
    predictor=None,
    colormap=None,
    big=False,
    tags=(),
):
    """The bytes of a TIFF that holds `samples` (H, W) or (H, W, S), numbers as they are to be stored.

    Args:
        bits: of a sample. order: "<" or ">". rows: of a strip; None: all. tile: side of square tiles instead of strips.
        tags: further (tag, type, values), or (tag, None) to leave one out.
    """
    samples = np.atleast_3d(samples)
    h, w, n = samples.shape
    layers = np.moveaxis(samples, 2, 0)[..., None] if planar == 2 else [samples]
    side = (tile, tile) if tile else (rows or h, w)
    parts = []
    for layer in layers:
        for y in range(0, h, side[0]):
            for x in range(0, w, side[1]):
                part = layer[y : y + side[0], x : x + side[1]]
                if tile:
                    part = np.pad(part, [(0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)])
                data = _packed(part, bits, order, predictor)
                data = zlib.compress(data) if deflate else data
                parts.append(data.translate(_REVERSED) if fill_order == 2 else data)
    entries = {256: (4, [w]), 257: (4, [h]), 258: (3, [bits] * n), 259: (3, [8 if deflate else 1])}
    entries |= {262: (3, [photometric]), 277: (3, [n])}
    where, sizes = (324, 325) if tile else (273, 279)
    entries |= {322: (4, [tile]), 323: (4, [tile])} if tile else {278: (4, [side[0]])}
    entries |= {where: (16 if big else 4, [0] * len(parts)), sizes: (4, [len(part) for part in parts])}
    optional = {266: fill_order, 274: orientation, 284: planar, 317: predictor}
    entries |= {tag: (3, [value]) for tag, value in optional.items() if value is not None}
    entries |= {338: (3, list(extra))} if extra else {}
    entries |= {339: (3, [sample_format] * n)} if sample_format else {}
    entries |= {320: (3, list(np.ravel(colormap)))} if colormap is not None else {}
    for tag, *rest in tags:
        entries.pop(tag, None) if rest == [None] else entries.update({tag: tuple(rest)})
    return _file(entries, parts, where, order, big)


def _packed(part, bits, order, predictor):
    """Rows of samples as bytes, each row filled up to whole bytes."""
    if bits >= 8:
        kind = {8: "u1", 16: "u2", 32: "u4", 64: "u8"}.get(bits)
        if kind is not None:
            values = part.astype(f"f{bits // 8}" if part.dtype.kind == "f" else f"i{bits // 8}").view(kind)
            if predictor == 2:
                values = np.concatenate([values[:, :1], np.diff(values, axis=1)], 1)
            return values.astype(order + kind).tobytes()
    flat = part.reshape(len(part), -1).astype(np.uint16)
    ones = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(ones.reshape(len(part), -1).astype(np.uint8), axis=1).tobytes()


def _file(entries, parts, where, order, big):
    """Header, one directory, the values that do not fit into it, the pixels."""
    head, count, cell = (16, "Q", 8) if big else (8, "H", 4)
    word = "Q" if big else "I"
    size = {"H": 2, "Q": 8}[count] + len(entries) * (4 + 2 * cell) + cell
    at = head + size

    def encoded(kind, values):
        return struct.pack(f"{order}{len(values)}{_CODES[kind]}", *(int(v) for v in values))

    places = {}
    for tag, (kind, values) in entries.items():
        if len(encoded(kind, values)) > cell:
            places[tag], at = at, at + len(encoded(kind, values))
    offsets = [at + sum(map(len, parts[:i])) for i in range(len(parts))]
    if not any(entries[where][1]):
        entries[where] = (entries[where][0], offsets[: len(entries[where][1])])
    start = struct.pack(f"{order}2sHHHQ", b"II" if order == "<" else b"MM", 43, 8, 0, 16) if big else struct.pack(
        f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)  # fmt: skip
    directory, outside = struct.pack(order + count, len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        data = encoded(kind, values)
        directory += struct.pack(f"{order}HH{word}", tag, kind, len(values))
        if tag in places:
            directory += struct.pack(order + word, places[tag])
        else:
            directory += data.ljust(cell, b"\0")
    for tag in places:
        outside += encoded(*entries[tag])
    return start + directory + struct.pack(order + word, 0) + outside + b"".join(parts)
