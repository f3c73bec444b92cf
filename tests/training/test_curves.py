"""Steps with kernels and without: the same curve. `--steps 50` for a longer one than the default."""

import pytest
import torch

pytest.importorskip("triton")

from segmenter.data.loader import Batch
from segmenter.inference.images import normalize, read_image
from tests.support.tiny_runs import tiny_recipe
from tests.training.test_loop import make_run

BAND = 2e-3  # of the loss, which is about 1; rounding alone grows from 1e-7 with the steps


def batches(root, steps):
    """Crops of a photograph; what is to be learned is how bright it is there."""
    photo = normalize(read_image(root / "examples/street.jpg"), "vit")
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tops, lefts = (torch.randint(0, size - 32, (2,), generator=generator).tolist() for size in photo.shape[-2:])
        images = torch.stack([photo[:, t : t + 32, left : left + 32] for t, left in zip(tops, lefts, strict=True)])
        labels = (images.mean(1) * 1.5 + 2).clamp(0, 4).long()
        yield Batch(images, labels, ["crop"] * 2, [])


@pytest.mark.more
def test_steps_with_and_without_kernels(tmp_path, pytestconfig):
    curves, steps = [], pytestconfig.option.steps
    for impl in ("eager", "triton"):
        recipe = tiny_recipe(
            tmp_path, impl=impl, dropout=0.0, drop_path=0.2, decoder_dropout=0.0, epochs=20, n_layers=1
        )
        run = make_run(recipe, tmp_path / impl)
        curves.append([run.training_step(batch)["loss"] for batch in batches(pytestconfig.rootpath, steps)])
    eager, ours = map(torch.tensor, curves)
    assert eager[-steps // 3 :].mean() < 0.9 * eager[: steps // 3].mean(), "it learns"
    assert ((ours - eager).abs() <= BAND).all(), (ours - eager).abs().max()
