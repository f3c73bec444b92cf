"""Labels from queries, checked by what the classes that were chosen score exactly."""

import torch

from bench.gate import shortfall
from segmenter.kernels import reference_queries
from segmenter.kernels.reference import label_dtype

EPS = torch.finfo(torch.float32).eps


def queries(B, n, Q, C, grid=(3, 2), seed=0, dtype=torch.float32):
    """Random masks (B, n, Q, gh, gw) and classes (B, n, Q, C + 1); "no object" wins for some queries."""
    generator = torch.Generator().manual_seed(seed)
    masks = 3 * torch.randn(B, n, Q, *grid, generator=generator)
    return masks.to(dtype), (2 * torch.randn(B, n, Q, C + 1, generator=generator)).to(dtype)


def assert_labels(labels, masks, classes, *geometry, scores=None, limit=8 * EPS):
    """Every label's exact score is the best, or less by no more than rounding in float32 amounts to.

    scores: exact ones, (B, C, H, W) float64, if those of the definition are not meant. limit: in units of the largest.
    """
    if scores is None:
        scores = reference_queries.queries_scores(masks.cpu().double(), classes.cpu().double(), *geometry)
    assert scores.dtype == torch.float64
    assert labels.dtype == label_dtype(scores.shape[1]) and labels.shape == (len(scores), *scores.shape[2:])
    assert int(labels.min()) >= 0 and int(labels.max()) < scores.shape[1]
    missing = shortfall(labels.cpu(), scores)
    worst = missing.max().item()
    assert worst <= limit * scores.abs().max().item(), (
        f"pixel {missing.flatten().argmax()} scores {worst:.2e} too little"
    )
