"""Windows that overlap up to a thousandfold: labels are the published ones, and no more work than with scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segmenter.inference import pruned_argmax
from segmenter.inference.merge import View, fill_labels
from segmenter.inference.windows import windows_of
from tests.inference.test_pruned_argmax import fused
from tests.support.upsampling import MASKS, expected_labels, random_masks

STRIDES_OF_32 = [1, 2, 4, 8, 16, 31, 32]


@fused
@pytest.mark.parametrize("stride", STRIDES_OF_32)
def test_any_stride(stride):
    """From a thousand windows over a pixel to one: the published labels, images and classes drawn at random."""
    generator = torch.Generator().manual_seed(stride)
    for kind, make in MASKS.items():
        height, width, K = (int(torch.randint(a, b, (), generator=generator)) for a, b in ((32, 44), (32, 72), (2, 7)))
        patch = (8, 16, 7)[K % 3]  # windows of 32 are padded to 35
        windows = windows_of((height, width), 32, stride, patch)
        n, cells = len(windows.tops) * len(windows.lefts), windows.size[0] // patch
        masks = make(n, cells, cells, K, seed=stride)[None]
        want = expected_labels(masks, *windows.geometry)
        assert torch.equal(pruned_argmax.windows_argmax(masks, *windows.geometry), want), (kind, height, width, K)


class Work(TorchDispatchMode):
    """Counts calls and the elements that they give."""

    def __init__(self):
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.calls, self.elements = self.calls + 1, self.elements + result.numel()
        return result


@pytest.mark.parametrize("K", [4, 40])
@pytest.mark.parametrize(
    ("shape", "window", "stride", "patch"),
    [*(((40, 56), 32, stride, 8) for stride in STRIDES_OF_32), ((160, 192), 128, 16, 32)],  # the last: large tiles
)
def test_labels_are_no_more_work_than_scores_of_all_classes(shape, window, stride, patch, K):
    """Each pixel has 256 windows at stride 2: what is done for each may not depend on the others."""
    windows = windows_of(shape, window, stride, patch)
    masks = random_masks(len(windows.tops) * len(windows.lefts), window // patch, window // patch, K)[None]
    with Work() as alone:
        pruned_argmax.windows_argmax(masks, *windows.geometry)
    with Work() as all_classes:
        fill_labels(torch.empty(shape, dtype=torch.uint8), [View(masks[0], windows)])
    assert all_classes.elements > shape[0] * shape[1] * K * (window / stride) ** 2 / 4  # upsampling is counted
    assert alone.elements < 1.5 * all_classes.elements
    assert alone.calls < 2 * all_classes.calls + 100
