"""Labels from queries at full sizes, and EoMT from bytes to labels: right, in little memory, captured, no waiting."""

import pytest
import torch

from segmenter.eomt import load_eomt
from segmenter.kernels import reference_queries
from segmenter.kernels.queries_argmax import queries_argmax
from tests.gpu.conftest import size
from tests.support import eomt
from tests.support.queries import assert_labels, queries

# Of EoMT for ADE20K: an image of 384 x 683 pixels, resized to 512 x 910, in two windows.
GEOMETRY = size(
    ((0,), (0, 398), (512, 512), (512, 910), (384, 683)), ((0,), (0, 5), (8, 8), (8, 13), (6, 10))
)  # fmt: skip
QUERIES, GRID = size((100, (128, 128)), (5, (2, 2)))
# Products of float32 in float32; of half types in TF32, which cuts off 2^-10 of each operand.
LIMITS = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-9}
needs_eomt = pytest.mark.skipif(eomt.why_not() is not None, reason=str(eomt.why_not()))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("C", size((2, 19, 133, 150, 256, 300), (3,)))
def test_labels_score_best(C, dtype, device):
    masks, classes = queries(2, 2, QUERIES, C, GRID, seed=C, dtype=dtype)
    canvas = GEOMETRY[3]
    for geometry in (GEOMETRY, (*GEOMETRY[:4], canvas)):
        got = queries_argmax(masks.to(device), classes.to(device), *geometry)
        scores = reference_queries.queries_scores(masks.to(device).double(), classes.to(device).double(), *geometry)
        assert_labels(got, masks, classes, *geometry, scores=scores.cpu(), limit=LIMITS[dtype])


def test_again_and_again(device):
    masks, classes = (t.to(device).bfloat16() for t in queries(1, 2, QUERIES, size(150, 3), GRID))
    first = queries_argmax(masks, classes, *GEOMETRY)
    for _ in range(size(100, 2)):
        assert torch.equal(queries_argmax(masks, classes, *GEOMETRY), first)


@pytest.mark.card
def test_scores_and_upsampled_masks_are_never_held(device):
    masks, classes = (t.to(device).bfloat16() for t in queries(1, 2, QUERIES, 150, GRID))
    queries_argmax(masks, classes, *GEOMETRY)  # compiles, and makes tables
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    queries_argmax(masks, classes, *GEOMETRY)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 150 * 384 * 683 * 4 / 50


@pytest.mark.card
def test_graph_capture_and_replay_with_changed_masks(device):
    masks, classes = (t.to(device) for t in queries(1, 2, QUERIES, 150, GRID))
    queries_argmax(masks, classes, *GEOMETRY)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = queries_argmax(masks, classes, *GEOMETRY)
    for seed in range(3):
        for static, new in zip((masks, classes), queries(1, 2, QUERIES, 150, GRID, seed), strict=True):
            static.copy_(new)
        graph.replay()
        assert torch.equal(out, queries_argmax(masks, classes, *GEOMETRY))


@needs_eomt
@pytest.mark.card
@pytest.mark.parametrize("kind", eomt.NAMES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_eomt_is_captured_and_does_not_wait(kind, dtype, device, tmp_path):
    eomt.write(tmp_path / "tiny", kind)
    model = load_eomt(tmp_path / "tiny", device=device)
    assert model.impl == "triton" and model.report.swapped
    pixels = [torch.randint(0, 256, (2, 40, 70, 3), dtype=torch.uint8) for _ in range(3)]
    compiled = model.compile_inference(2, 40, 70, dtype=dtype)
    assert compiled.shapes == [(2, 40, 70)]
    for batch in pixels:
        want = torch.stack([model.segment(image.numpy(), dtype=dtype) for image in batch])
        assert (compiled(batch) != want).float().mean() < 1e-3  # batches choose other tiles of products
    assert compiled.used == 3
    on_device = pixels[0].to(device)
    with torch.inference_mode():
        model.labels_of_pixels(on_device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.labels_of_pixels(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
