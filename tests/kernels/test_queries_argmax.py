"""Masks and classes of queries to labels by the kernel, in the interpreter: every label scores best."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from segmenter.kernels import configs_queries, launch, reference_queries
from segmenter.kernels.canvas_axis import canvas_axis
from segmenter.kernels.configs_queries import QueriesArgmaxConfig
from segmenter.kernels.queries_argmax import MAX_HELD, _run, class_blocks, queries_argmax
from tests.support.largest import Largest
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE
from tests.support.queries import assert_labels, queries

# (tops, lefts, window, canvas, shape)
GEOMETRIES = {
    "one window": ((0,), (0,), (8, 8), (8, 8), (8, 8)),
    "resized": ((0,), (0,), (8, 8), (8, 8), (13, 6)),
    "down to fewer pixels": ((0,), (0,), (12, 9), (12, 9), (5, 4)),
    "padding below": ((0,), (0,), (8, 8), (5, 8), (5, 8)),
    "padding on the right, resized": ((0,), (0,), (8, 8), (8, 6), (11, 9)),
    "windows below each other": ((0, 4, 8), (0,), (8, 6), (16, 6), (21, 7)),
    "windows beside each other": ((0,), (0, 3), (6, 6), (6, 9), (6, 9)),
    "rows and columns of windows": ((0, 3), (0, 5), (6, 6), (9, 11), (10, 12)),
    "a last row that no window covers": ((0, 4), (0,), (6, 6), (11, 6), (16, 6)),
    "windows that end where others begin": ((0, 5), (0,), (5, 4), (10, 4), (19, 33)),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def labels(masks, classes, *geometry):
    return queries_argmax(masks.to(DEVICE), classes.to(DEVICE), *geometry).cpu()


def by_hand(masks, classes, tops, lefts, window, canvas, shape):
    """Scores (B, C, H, W) as transformers computes them, of any windows, in the type of the masks."""
    masks = F.interpolate(masks.flatten(0, 1), window, mode="bilinear").unflatten(0, masks.shape[:2])
    scores = torch.einsum("bnqc,bnqhw->bnchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    total = scores.new_zeros(len(masks), scores.shape[2], canvas[0] + window[0], canvas[1] + window[1])
    count = torch.zeros_like(total)
    for k, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        total[place] += scores[:, k]
        count[place] += 1
    mean = (total / count.clamp(min=1))[..., : canvas[0], : canvas[1]]
    return F.interpolate(mean, shape, mode="bilinear")


@every_geometry
def test_the_definition_is_the_formula(geometry):
    """Weights of interpolation are float32 in the definition, also in float64."""
    masks, classes = queries(2, len(geometry[0]) * len(geometry[1]), 5, 4)
    want = by_hand(masks.double(), classes.double(), *geometry)
    found = reference_queries.queries_scores(masks.double(), classes.double(), *geometry)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    found = reference_queries.queries_scores(masks, classes, *geometry)
    torch.testing.assert_close(found, want.float(), rtol=0, atol=1e-6)
    assert_labels(reference_queries.queries_argmax(masks, classes, *geometry), masks, classes, *geometry)


@pytest.mark.parametrize("size", [(40, 23), (23, 40), (24, 24)])
def test_the_definition_is_transformers(size):
    """Its windows and its merging, of an image higher or wider than the window."""
    transformers = pytest.importorskip("transformers")
    side, (H, W) = 24, size
    sizes = {"shortest_edge": side, "longest_edge": None}
    try:
        processor = transformers.EomtImageProcessor(size=sizes, do_split_image=True)
        found = processor([torch.zeros(3, H, W, dtype=torch.uint8)] * 2)
    except ImportError as error:  # torchvision
        pytest.skip(str(error))
    offsets = sorted(offset.tolist() for offset in found["patch_offsets"])
    starts = tuple(start for image, start, _ in offsets if image == 0)
    masks, classes = queries(2, len(starts), 6, 5, (6, 6))
    output = SimpleNamespace(
        masks_queries_logits=masks.flatten(0, 1).double(), class_queries_logits=classes.flatten(0, 1).double(),
        patch_offsets=offsets,
    )  # fmt: skip
    theirs = processor.post_process_semantic_segmentation(output, [size] * 2, return_segmentation_scores=True)
    scores = torch.stack([image["segmentation_scores"] for image in theirs]).double()
    canvas = (side * H // W, side) if H > W else (side, side * W // H)
    anchors = (starts, (0,)) if H > W else ((0,), starts)
    geometry = (*anchors, (side, side), canvas, size)
    assert (reference_queries.queries_scores(masks, classes, *geometry) - scores).abs().max() < 1e-6
    assert_labels(labels(masks, classes, *geometry), masks, classes, *geometry, scores=scores)


@every_geometry
def test_labels_score_best(geometry):
    masks, classes = queries(2, len(geometry[0]) * len(geometry[1]), 5, 7)
    got = labels(masks, classes, *geometry)
    assert_labels(got, masks, classes, *geometry)
    assert len(got.unique()) > 2


@pytest.mark.parametrize("C", [1, 2, 15, 16, 17, 33, 150, 256, 257, 300])
def test_class_counts(C):
    geometry = GEOMETRIES["windows beside each other"]
    masks, classes = queries(1, 2, 3, C, seed=C)
    got = labels(masks, classes, *geometry)
    assert_labels(got, masks, classes, *geometry)
    assert len(got.unique()) > 1 or C == 1


@pytest.mark.parametrize("Q", [1, 15, 16, 17, 33, 100])
def test_query_counts(Q):
    geometry = GEOMETRIES["resized"]
    masks, classes = queries(1, 1, Q, 5, seed=Q)
    assert_labels(labels(masks, classes, *geometry), masks, classes, *geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_widened(dtype):
    """Nothing but a GPU's products is less exact than of float32 (TF32: 2^-11)."""
    for geometry in (GEOMETRIES["one window"], GEOMETRIES["rows and columns of windows"]):
        masks, classes = queries(1, len(geometry[0]) * len(geometry[1]), 20, 6, dtype=dtype)
        limit = {} if DEVICE == "cpu" else {"limit": 2**-9}
        assert_labels(labels(masks, classes, *geometry), masks, classes, *geometry, **limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pixels_that_no_query_claims_have_a_class(dtype):
    """Scores of 1e-9, far below what float16 can tell apart."""
    masks, classes = queries(1, 1, 5, 4, dtype=dtype)
    masks -= 22
    geometry = GEOMETRIES["one window"]
    got = labels(masks, classes, *geometry)
    scores = by_hand(masks.double(), classes.double(), *geometry)
    assert scores.max() < 1e-5
    assert_labels(got, masks, classes, *geometry)
    assert len(got.unique()) > 1


def test_no_object_takes_its_share_first():
    """Of two queries the surer one wins, though its class beats the others' by less."""
    classes = torch.tensor([[2.0, 1.9, -9.0], [3.0, -9.0, 5.0]]).view(1, 1, 2, 3)  # the second is "no object"
    classes[..., 1, :] = torch.tensor([0.0, 1.0, 6.0])
    masks = torch.ones(1, 1, 2, 1, 1)
    geometry = ((0,), (0,), (2, 2), (2, 2), (2, 2))
    renormalised = classes[..., :-1].softmax(-1).sum(2)
    assert renormalised.argmax() == 1 and by_hand(masks, classes, *geometry).argmax(1).unique() == 0
    assert labels(masks, classes, *geometry).unique() == 0


def test_equals_go_to_the_lowest_class():
    """Also in the second block of classes, and beyond those that are accumulated together. Of one query, so that there
    is no sum, which the interpreter adds in an order of its own."""
    for C, equal in ((40, (3, 35)), (40, (33, 38)), (300, (5, 290)), (300, (270, 299))):
        masks, classes = queries(1, 1, 1, C)
        classes[..., list(equal)] = 9.0
        geometry = GEOMETRIES["one window"]
        assert labels(masks, classes, *geometry).unique().tolist() == [equal[0]]
        assert reference_queries.queries_argmax(masks, classes, *geometry).unique().tolist() == [equal[0]]


def test_every_block_of_classes_holds_them_all():
    for C in range(1, 1025):
        first, second = class_blocks(C)
        assert first >= 16 and first & (first - 1) == 0
        assert second == 0 or (second >= 16 and second & (second - 1) == 0)
        assert first + second >= min(C, MAX_HELD)
        assert first + second <= MAX_HELD and (C > MAX_HELD or first + second <= max(32, 1.5 * C))
    assert class_blocks(150) == (128, 32)


@pytest.mark.parametrize("config", [QueriesArgmaxConfig(1, 16, 16, 1, 1), QueriesArgmaxConfig(8, 4, 32, 2, 1),
                                    *(row.config for row in configs_queries.QUERIES_ARGMAX)], ids=str)  # fmt: skip
def test_tiles_do_not_matter(config):
    geometry = GEOMETRIES["rows and columns of windows"]
    masks, classes = queries(1, 4, 18, 20)
    got = _run(masks.to(DEVICE), classes.to(DEVICE), geometry, config).cpu()
    assert_labels(got, masks, classes, *geometry)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    geometry = GEOMETRIES["windows beside each other"]
    masks, classes = queries(2, 2, 3, 5)
    placed = [LAYOUTS[layout](t.to(DEVICE)) for t in (masks, classes)]
    if placed[0].shape == masks.shape and placed[1].shape == classes.shape:
        assert torch.equal(
            queries_argmax(*placed, *geometry),
            queries_argmax(*(t.clone(memory_format=torch.contiguous_format) for t in placed), *geometry),
        )


def test_nothing_is_written_outside_the_labels(guarded_outputs):
    """With tiles that end beyond the image, at both borders."""
    for geometry in (GEOMETRIES["windows that end where others begin"], GEOMETRIES["one window"]):
        masks, classes = queries(2, len(geometry[0]), 3, 3)
        assert_labels(labels(masks, classes, *geometry), masks, classes, *geometry)


def test_queries_that_are_no_numbers_give_some_class():
    masks, classes = queries(1, 1, 4, 5)
    masks[0, 0, 1, 1] = math.nan
    classes[0, 0, 2] = math.inf
    geometry = GEOMETRIES["resized"]
    assert labels(masks, classes, *geometry).max() < 5
    assert labels(torch.full_like(masks, math.nan), classes, *geometry).max() < 5


def test_nothing_in_nothing_out():
    geometry = GEOMETRIES["one window"]
    assert labels(*queries(0, 1, 3, 4), *geometry).shape == (0, 8, 8)
    assert reference_queries.queries_scores(*queries(0, 1, 3, 4), *geometry).shape == (0, 4, 8, 8)
    assert labels(*queries(1, 1, 0, 4), *geometry).unique().tolist() == [0]


@every_geometry
def test_blocks_of_the_definition_do_not_matter(geometry, monkeypatch):
    masks, classes = queries(1, len(geometry[0]) * len(geometry[1]), 5, 7)
    want = reference_queries.queries_scores(masks, classes, *geometry)
    monkeypatch.setattr(reference_queries, "BLOCK", 1)
    torch.testing.assert_close(reference_queries.queries_scores(masks, classes, *geometry), want, rtol=1e-6, atol=1e-6)


def test_the_definition_never_has_all_scores():
    masks, classes = queries(1, 2, 20, 30, (8, 8))
    geometry = ((0,), (0, 200), (512, 512), (512, 712), (1024, 1424))
    with Largest() as largest:
        found = reference_queries.queries_argmax(masks, classes, *geometry)
    assert found.shape == (1, 1024, 1424)
    assert largest.numel <= 2 * reference_queries.BLOCK < 30 * 1024 * 1424


ZEROS = torch.zeros(1, 1, 3, 2, 2), torch.zeros(1, 1, 3, 5)
BAD = {
    "rank": (torch.zeros(1, 3, 2, 2), None, {}, ValueError, r"masks must be \(B, 1, Q, gh, gw\), one for each window"),
    "windows": (None, None, {"tops": (0, 3)}, ValueError, r"masks must be \(B, 2, Q, gh, gw\)"),
    "no cells": (torch.zeros(1, 1, 3, 0, 2), None, {}, ValueError, "masks must be"),
    "no class": (None, torch.zeros(1, 1, 3, 1), {}, ValueError, r"classes must be \(B, 1, Q, C \+ 1\), C at least 1"),
    "queries": (None, torch.zeros(1, 1, 4, 5), {}, ValueError, "classes must be"),
    "float64": (ZEROS[0].double(), None, {}, launch.KernelError, "masks must be one of bfloat16, float16, float32"),
    "integers": (None, ZEROS[1].long(), {}, launch.KernelError, "classes must be one of bfloat16"),
    "outside": (None, None, {"tops": (9,)}, ValueError, r"windows at \[9\] do not ascend within a canvas of 8 pixels"),
    "size": (None, None, {"shape": (8, 0)}, ValueError, "sizes must be at least 1: 2 cells to 8 pixels, of 8, for 0"),
}


@pytest.mark.parametrize(("masks", "classes", "changed", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(masks, classes, changed, error, message):
    geometry = dict(zip(("tops", "lefts", "window", "canvas", "shape"), GEOMETRIES["one window"], strict=True))
    tensors = (ZEROS[0] if masks is None else masks, ZEROS[1] if classes is None else classes)
    with pytest.raises(error, match=message):
        queries_argmax(*(t.to(DEVICE) for t in tensors), **(geometry | changed))


def test_axes_know_their_windows():
    """Every tile is told of each window that covers one of the canvas pixels that its pixels lie between."""
    for anchors, window, canvas, length in (((0, 5, 10), 6, 16, 40), ((0, 3, 9), 4, 14, 5), ((0,), 8, 6, 6)):
        axis = canvas_axis(anchors, window, 2, canvas, length, False)
        for block in (1, 2, 4, 16):
            integers, floats = (t.numpy() for t in axis.table(block))
            bounds = integers[2 * (length + window) + len(anchors) :].reshape(-1, 2)
            assert len(bounds) == -(-length // block) and len(floats) == 2 * length + window
            for i, (first, stop) in enumerate(bounds):
                pixels = slice(i * block, (i + 1) * block)
                needed = {*axis.low[pixels], *axis.high[pixels]}
                covering = [k for k, a in enumerate(anchors) if any(a <= p < a + window for p in needed)]
                assert first <= min(covering, default=first) and max(covering, default=-1) < stop
