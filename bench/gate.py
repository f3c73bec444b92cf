"""Nothing is timed that is wrong: the tests' rule (tests/support/parity.py) on the inputs that will be timed.

An operation has to be as near to the exact result as eager PyTorch of the same precision is, within a factor of two in
the worst element, four in the worst row and one in the whole. For labels there is no nearness, so each pixel's class is
judged by how far its exact score stays below the best class's: ties and near-ties may fall either way, nothing else.
"""

import torch

from segmenter.kernels.reference import explicit_attention
from tests.support.parity import assert_parity


class GateError(AssertionError):
    """A provider's result is wrong, so it is not timed."""


def check(
    provider: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    max_ratio: float = 2.0,
    frobenius: float = 2.0,
) -> str:
    """Says how the largest error compares with eager's.

    Raises:
        GateError: it is further from `exact` than the rule allows.
    """
    try:
        # Every provider counts as eager here, also against itself; the whole may be off by a little more than eager's
        # because library kernels add in an order of their own.
        assert_parity(actual, exact, eager, max_ratio=max_ratio, frobenius=frobenius)
    except AssertionError as error:
        raise GateError(f"{provider} is wrong and is not timed: {error}") from None
    ours, theirs = (largest_error(x, exact) for x in (actual, eager))
    return f"largest error {ours:.2e}, eager's {theirs:.2e}"


def largest_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance of an element from the exact one."""
    return (actual.detach().double() - exact.double()).abs().max().item()


def shortfall(labels: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """How far the score of each pixel's label is below the best: labels (B, H, W), scores (B, K, H, W) -> (B, H, W)."""
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    return scores.amax(1) - chosen


def check_labels(provider: str, labels: torch.Tensor, scores: torch.Tensor, eager: torch.Tensor, floor: float) -> str:
    """As `check` for labels (B, H, W), given exact scores (B, K, H, W) and eager's labels.

    Args:
        floor: allowed shortfall in units of the largest score, for rounding where eager happens to be exact.
    Raises:
        GateError: a pixel has a class whose exact score is clearly not the best.
    """
    if labels.shape != eager.shape:
        raise GateError(f"{provider} is wrong: labels {tuple(labels.shape)}, expected {tuple(eager.shape)}")
    if int(labels.max()) >= scores.shape[1]:
        raise GateError(f"{provider} is wrong: label {int(labels.max())} of {scores.shape[1]} classes")
    ours, theirs = (shortfall(x, scores).max().item() for x in (labels, eager))
    limit = max(2 * theirs, floor * scores.abs().max().item())
    if not ours <= limit:
        worst = shortfall(labels, scores).flatten().argmax().item()
        raise GateError(
            f"{provider} is wrong and is not timed: at pixel {worst} of {labels.numel()} its class scores {ours:.3e} "
            f"less than the best, allowed {limit:.3e}"
        )
    same = (labels.long() == eager.long()).double().mean().item()
    return f"largest shortfall {ours:.2e}, eager's {theirs:.2e}; {100 * same:.3f} % of labels as eager's"


def attention_references(qkv: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, ...]:
    """(exact, eager in the type of qkv) attention of packed qkv, one image and head at a time: 16k tokens fit so."""
    heads = qkv.detach().unflatten(2, (3, n_heads, -1))  # (B, N, 3, h, d)

    def attend(dtype: torch.dtype) -> torch.Tensor:
        one = [[explicit_attention(head.flatten(1)[None].to(dtype), 1) for head in image.unbind(2)] for image in heads]
        return torch.cat([torch.cat(outs, 2) for outs in one])

    return attend(torch.float64), attend(qkv.dtype)
