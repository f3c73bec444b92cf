"""Steps with kernels and without: the same curve, and the same weights of the shipped model after fine-tuning it.

`--steps 50` for a longer curve than the default.
"""

import pytest
import torch

pytest.importorskip("triton")

from segmenter.data.loader import Batch
from segmenter.inference.images import normalize, read_image
from segmenter.training.recipe import Recipe
from segmenter.weights.load import from_pretrained
from tests.support.data_sets import make_data_set
from tests.support.tiny_runs import tiny_recipe
from tests.training.test_loop import make_run

BAND = 2e-3  # of the loss, which is about 1; rounding alone grows from 1e-7 with the steps


# Of the way that weights go, of all together and of each parameter: float32's rounding of a weight is 6e-8 of it, and
# some go no further than a ten-thousandth of their size.
WEIGHTS, EACH = 1e-4, 2e-3


def crops(photo, step):
    """Two of a tensor (..., H, W), (2, ..., 32, 32)."""
    generator = torch.Generator().manual_seed(step)
    tops, lefts = (torch.randint(0, size - 32, (2,), generator=generator).tolist() for size in photo.shape[-2:])
    return torch.stack([photo[..., t : t + 32, left : left + 32] for t, left in zip(tops, lefts, strict=True)])


def batches(root, steps):
    """Crops of a photograph; what is to be learned is how bright it is there."""
    photo = normalize(read_image(root / "examples/street.jpg"), "vit")
    for step in range(steps):
        images = crops(photo, step)
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
    assert not torch.equal(ours, eager), "the same bits: no kernel was called"


@pytest.mark.more
def test_the_shipped_model_is_fine_tuned_to_the_same_weights(tmp_path, pytestconfig):
    """On crops, which it has to label as it labels the whole photograph; with kernels and without."""
    examples = pytestconfig.rootpath / "examples"
    if not (shipped := examples / "camvid-seg-s-mask-16" / "model.safetensors").exists():
        pytest.skip("the source archive holds no weights; the repository does")
    model, photo = from_pretrained(shipped.parent), read_image(examples / "street.jpg")
    labels, photo = model.segment(photo).long(), normalize(photo, model.info.normalization)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data, weights, losses = make_data_set(tmp_path / "data", kind="camvid"), [], []
    for impl in ("eager", "triton"):
        settings = {"crop_size": 32, "epochs": 2, "batch_size": 2, "learning_rate": 2e-3, "decoder_dropout": 0.0}
        recipe = Recipe(str(data), str(shipped.parent), impl=impl, workers=0, **settings)
        run = make_run(recipe, tmp_path / impl)
        steps = [Batch(crops(photo, step), crops(labels, step), ["crop"] * 2, []) for step in range(2)]
        losses.append([run.training_step(step)["loss"] for step in steps])
        weights.append(dict(run.model.named_parameters()))
    moved = apart = 0.0
    for name, old in before.items():
        eager, ours = (found[name].detach() for found in weights)
        if old.shape == eager.shape and not torch.equal(old, eager):
            way, distance = (eager - old).norm().item(), (ours - eager).norm().item()
            moved, apart = moved + way**2, apart + distance**2
            assert distance <= EACH * way, f"{name}: {distance:.2e} apart after {way:.2e}"
    assert moved**0.5 > 1e-2, "it learns something"
    assert 0 < apart**0.5 <= WEIGHTS * moved**0.5, "0: no kernel was called"
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)
