"""Optimiser, loss and steps. `test_training_runs.py` has whole runs, `test_training_processes.py` kills them."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmenter.data.datasets import open_dataset
from segmenter.data.loader import Batch
from segmenter.training.distributed import Group
from segmenter.training.loop import Run, TrainingError
from segmenter.training.loss_terms import parse_loss
from segmenter.training.losses import SegmentationLoss, class_weights
from segmenter.training.optimizer import averaged, gradient_norm, make_optimizer, parameter_groups
from segmenter.training.recipe import Recipe, RecipeError
from tests.support.data_sets import make_data_set, save
from tests.support.tiny import tiny_model
from tests.support.tiny_runs import differences, read_checkpoint, tiny_recipe, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def make_run(recipe, output):
    """A run that has not begun."""
    dataset = open_dataset(recipe.data)
    output.mkdir(exist_ok=True)
    return Run(recipe.completed(dataset.key), dataset, output, Group())


def batch_of(seed=0, names=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(names), 3, 32, 32, generator=generator)
    return Batch(images, torch.randint(0, 5, (len(names), 32, 32), generator=generator), list(names), [])


class TestOptimizer:
    def test_published_is_nesterov_sgd_without_decay_on_the_polynomial_schedule(self):
        """Against torch's own optimiser and the formula, over three updates with the same gradients."""
        model = tiny_model()
        expected = copy.deepcopy(model)
        optimizer, schedule = make_optimizer(model, Recipe("d", learning_rate=0.1), 10)
        sgd = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for t in range(3):
            rate = (0.1 - 1e-5) * (1 - t / 10) ** 0.9 + 1e-5
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate, rel=1e-12)]
            sgd.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            generator = torch.Generator().manual_seed(t)
            for a, b in zip(model.parameters(), expected.parameters(), strict=True):
                a.grad = torch.randn(a.shape, generator=generator)
                b.grad = a.grad.clone()
            optimizer.step()
            schedule.step()
            sgd.step()
        assert differences(weights(model), weights(expected)) == []
        assert differences(weights(model), weights(tiny_model()))

    def test_layers_learn_the_slower_the_further_from_the_decoder(self):
        """Two blocks, the last one at half the decoder's rate; positions, tokens, biases and norms are not decayed."""
        model = tiny_model()
        rates = {"learning_rate": 1.0, "backbone_rate": 0.5, "layer_decay": 0.25, "min_lr": 0.0}
        recipe = Recipe("d", weight_decay=0.1, optimizer="adamw", **rates)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, recipe)
        found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert found.keys() == set(names.values()) and sum(len(g["params"]) for g in groups) == len(found)
        expected = {
            "encoder.pos_embed": (0.03125, 0.0),
            "encoder.cls_token": (0.03125, 0.0),
            "encoder.patch_embed.proj.weight": (0.03125, 0.1),
            "encoder.patch_embed.proj.bias": (0.03125, 0.0),
            "encoder.blocks.0.attn.qkv.weight": (0.125, 0.1),
            "encoder.blocks.0.norm1.weight": (0.125, 0.0),
            "encoder.blocks.1.mlp.fc2.weight": (0.5, 0.1),
            "encoder.blocks.1.mlp.fc2.bias": (0.5, 0.0),
            "encoder.norm.weight": (0.5, 0.0),
            "decoder.cls_emb": (1.0, 0.0),
            "decoder.proj_dec.weight": (1.0, 0.1),
            "decoder.blocks.0.attn.qkv.weight": (1.0, 0.1),
            "decoder.mask_norm.weight": (1.0, 0.0),
        }
        assert {name: found[name] for name in expected} == expected
        optimizer, _ = make_optimizer(model, recipe, 10)
        assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.999)

    def test_warm_up_rises_from_the_first_step(self):
        optimizer, schedule = make_optimizer(tiny_model(), Recipe("d", learning_rate=0.1, min_lr=0, warmup_steps=4), 10)
        rates = []
        for _ in range(6):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        ramp = [0.1 * t / 4 * 0.6**0.9 for t in (1, 1, 2, 3)]
        assert rates == pytest.approx([*ramp, 0.1 * 0.6**0.9, 0.1 * 0.5**0.9])

    def test_a_warm_up_as_long_as_the_run(self):
        with pytest.raises(RecipeError, match="warmup_steps 10 must be fewer than the 10 steps"):
            make_optimizer(tiny_model(), Recipe("d", learning_rate=0.1, warmup_steps=10), 10)

    def test_a_floor_above_the_smallest_rate_would_raise_it(self):
        recipe = Recipe("d", learning_rate=1e-4, layer_decay=0.3)
        with pytest.raises(RecipeError, match=r"min_lr 1e-05 is above the smallest learning rate, 9e-06"):
            make_optimizer(tiny_model(), recipe, 10)

    def test_nothing_to_train(self):
        with pytest.raises(RecipeError, match="nothing is left to train"):
            make_optimizer(tiny_model().requires_grad_(False), Recipe("d", learning_rate=0.1), 10)

    def test_average_of_weights(self):
        model = torch.nn.Linear(3, 2)
        average = averaged(model, 0.5)
        values = [torch.randn(2, 3) for _ in range(9)]
        expected = values[0]
        for t, value in enumerate(values):
            with torch.no_grad():
                model.weight.copy_(value)
            average.update_parameters(model)
            decay = min(0.5, (1 + t) / (10 + t))  # 2/11, 3/12 ... 8/17, 1/2
            expected = value if t == 0 else decay * expected + (1 - decay) * value
            torch.testing.assert_close(average.module.weight.data, expected)
        assert torch.equal(model.weight.data, values[-1])

    def test_gradients_are_scaled_down_to_the_norm(self):
        parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
        for clip, scale in ((None, 1.0), (26.0, 1.0), (6.5, 0.5)):
            parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
            assert gradient_norm(parameters, clip) == pytest.approx(13.0), "before it is scaled"
            torch.testing.assert_close(parameters[0].grad, scale * torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)
            torch.testing.assert_close(parameters[1].grad, scale * torch.tensor([12.0]), rtol=1e-5, atol=0)


class TestLoss:
    logits = torch.randn(3, 4, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    labels = torch.randint(0, 4, (3, 6, 7), generator=torch.Generator().manual_seed(1))
    labels[0, :5] = 255
    labels[2, 3] = 255

    @pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 0.0, 1.5])])
    def test_is_the_mean_over_pixels_that_count(self, weight):
        loss = SegmentationLoss(255, weight)
        got = loss(self.logits, self.labels, loss.denominator(self.labels))
        torch.testing.assert_close(got, F.cross_entropy(self.logits, self.labels, weight, ignore_index=255))
        assert got > 0.5

    @pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 0.0, 1.5])])
    def test_parts_of_processes_average_to_the_whole(self, weight):
        """Though the first process has 14 pixels and the second 70."""
        loss = SegmentationLoss(255, weight)
        parts = [(self.logits[i], self.labels[i]) for i in (slice(0, 1), slice(1, 3))]
        share = sum(loss.denominator(labels) for _, labels in parts) / 2
        mean = sum(loss(*part, share) for part in parts) / 2
        torch.testing.assert_close(mean, F.cross_entropy(self.logits, self.labels, weight, ignore_index=255))
        naive = sum(loss(*part, loss.denominator(part[1])) for part in parts) / 2
        assert (naive - mean).abs() > 1e-3

    def test_nothing_that_counts_is_no_loss_and_no_gradient(self):
        logits = self.logits.clone().requires_grad_()
        nothing = torch.full_like(self.labels, 255)
        loss = SegmentationLoss(255)
        value = loss(logits, nothing, loss.denominator(nothing))
        value.backward()
        assert value == 0 and not logits.grad.any()

    def test_half_precision_is_summed_in_float32(self):
        loss = SegmentationLoss(255)
        got = loss(self.logits.bfloat16(), self.labels, loss.denominator(self.labels))
        expected = F.cross_entropy(self.logits.bfloat16().float(), self.labels, ignore_index=255)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)

    def test_lovasz_is_added(self, monkeypatch):
        def made(mode, ignore_index):
            assert (mode, ignore_index) == ("multiclass", 255)
            return lambda logits, labels: logits.mean() * 0 + 7.0

        losses = SimpleNamespace(LovaszLoss=made)
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", SimpleNamespace(losses=losses))
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.losses", losses)
        plain, added = SegmentationLoss(255), SegmentationLoss(255, terms=parse_loss("cross_entropy + 0.5 lovasz"))
        n = plain.denominator(self.labels)
        difference = added(self.logits, self.labels, n) - plain(self.logits, self.labels, n)
        torch.testing.assert_close(difference, torch.tensor(3.5))
        assert added(self.logits, torch.full_like(self.labels, 255), n) == 0, "it has no value without pixels"
        half = added(self.logits, self.labels, n, 0.5) - plain(self.logits, self.labels, n, 0.5)
        torch.testing.assert_close(half, torch.tensor(1.75))

    @pytest.mark.more
    def test_lovasz_is_one_minus_the_iou_of_labels(self):
        pytest.importorskip("segmentation_models_pytorch")
        labels = torch.tensor([[[0, 0, 1, 1, 255]]])
        predicted = torch.tensor([[[0, 0, 0, 1, 1]]])
        logits = 200.0 * F.one_hot(predicted, 2).permute(0, 3, 1, 2)
        plain, added = SegmentationLoss(255), SegmentationLoss(255, terms=parse_loss("cross_entropy + lovasz"))
        difference = added(logits, labels, 4.0) - plain(logits, labels, 4.0)
        torch.testing.assert_close(difference, torch.tensor(1 - (2 / 3 + 1 / 2) / 2), rtol=1e-4, atol=0)

    def test_class_weights(self, tmp_path):
        """Shares 3/4 and 1/4 of the pixels that count, and three classes that are not there."""
        root = make_data_set(tmp_path, n=1)
        label = np.full((24, 32), 255, np.uint8)
        label[:12], label[:3] = 0, 1
        save(root / "annotations/train/train_0.png", label)
        got = class_weights(open_dataset(root), 0.5)
        raw = np.array([0.75**-0.5, 0.25**-0.5])
        np.testing.assert_allclose(got.numpy(), [*(raw / raw.mean()), 0, 0, 0], rtol=1e-6)


class TestSteps:
    def test_a_step_is_sgd_on_the_mean_loss(self, folder, tmp_path):
        """By hand, from the model's own gradients. Then the step does what its number says, and not what ran before."""
        run = make_run(tiny_recipe(folder, dropout=0.0, drop_path=0.0, decoder_dropout=0.0), tmp_path)
        before, batch = copy.deepcopy(run.model), batch_of()
        loss = F.cross_entropy(before(batch.images), batch.labels, ignore_index=255)
        loss.backward()
        facts = run.training_step(batch)
        assert facts["loss"] == pytest.approx(loss.item(), rel=1e-5) and facts["lr"] == 0.02
        gradients = [p.grad for p in before.parameters() if p.grad is not None]
        assert facts["grad_norm"] == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in gradients)), rel=1e-4)
        for old, new in zip(before.parameters(), run.model.parameters(), strict=True):
            if old.grad is not None:  # Nesterov: the first update is (1 + momentum) times the gradient
                torch.testing.assert_close(new.data, old.data - 0.02 * 1.9 * old.grad, rtol=1e-4, atol=1e-6)
        assert run.step == 1

    @pytest.mark.parametrize("amp", ["none", "float16"])
    def test_a_step_in_parts_is_the_same_step(self, folder, tmp_path, amp):
        """Though one part has far fewer pixels that count, and in less memory: the model sees one part at a time."""
        fields = {"dropout": 0.0, "drop_path": 0.0, "decoder_dropout": 0.0, "batch_size": 4, "amp": amp}
        batch = batch_of(names="abcd")
        batch.labels[:2, 3:] = 255
        whole, parts = (make_run(tiny_recipe(folder, accumulate=n, **fields), tmp_path / str(n)) for n in (1, 4))
        seen = []
        parts.parallel.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        facts = [run.training_step(batch) for run in (whole, parts)]
        assert seen == [1, 1, 1, 1]
        tolerance = 1e-5 if amp == "none" else 2e-2
        for name in ("loss", "grad_norm"):
            assert facts[1][name] == pytest.approx(facts[0][name], rel=tolerance)
        for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-6 if amp == "none" else 1e-3)

    def test_parts_must_be_equal(self, folder, tmp_path):
        with pytest.raises(RecipeError, match="batch_size 2 must be a multiple of the 1 processes times accumulate 3"):
            make_run(tiny_recipe(folder, accumulate=3), tmp_path)

    def test_dropout_follows_from_the_step_alone(self, folder, tmp_path):
        losses = []
        for noise in (1, 2):
            run = make_run(tiny_recipe(folder), tmp_path / str(noise))
            torch.manual_seed(noise)
            losses.append([run.training_step(batch_of())["loss"] for _ in range(2)])
        assert losses[0] == losses[1]
        still = make_run(tiny_recipe(folder, dropout=0.0, drop_path=0.0, decoder_dropout=0.0), tmp_path / "3")
        assert still.training_step(batch_of())["loss"] != losses[0][0], "there is dropout"

    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_what_is_not_finite_stops_and_changes_nothing(self, folder, tmp_path, what):
        run = make_run(tiny_recipe(folder), tmp_path)
        run.training_step(batch_of())
        before = weights(run.model)
        counted = run.loss

        class Broken(SegmentationLoss):
            def __call__(self, logits, *others):
                if what == "loss":
                    return counted(logits, *others) * math.nan
                return (logits.sum() * 0).sqrt()  # 0, with an infinite slope

        run.loss = Broken(255)
        message = {
            "loss": "the loss is nan at step 1, of",
            "gradient": "the norm of the gradients is nan at step 1, of",
        }
        with pytest.raises(TrainingError, match=f"{message[what]} the samples first, second;"):
            run.training_step(batch_of(names=("first", "second")))
        assert differences(weights(run.model), before) == [] and run.step == 1

    def test_clipping(self, folder, tmp_path):
        fields = {"dropout": 0.0, "drop_path": 0.0, "decoder_dropout": 0.0, "momentum": 0.0, "learning_rate": 1.0}
        run = make_run(tiny_recipe(folder, clip_grad=0.01, **fields), tmp_path)
        before = weights(run.model)
        assert run.training_step(batch_of())["grad_norm"] > 0.02
        moved = math.sqrt(sum(float(((a - before[n]) ** 2).sum()) for n, a in run.model.state_dict().items()))
        assert moved == pytest.approx(0.01, rel=1e-2)

    def test_a_frozen_backbone_stays(self, folder, tmp_path):
        run = make_run(tiny_recipe(folder, freeze_backbone=True), tmp_path)
        before = weights(run.model)
        for seed in range(2):
            run.training_step(batch_of(seed))
        changed = {
            name.split(".")[0] for name, tensor in weights(run.model).items() if not torch.equal(tensor, before[name])
        }
        assert changed == {"decoder"}

    @pytest.mark.parametrize("amp", ["bfloat16", "float16"])
    def test_autocast(self, folder, tmp_path, amp):
        fields = {"dropout": 0.0, "drop_path": 0.0, "decoder_dropout": 0.0}
        exact, run = (make_run(tiny_recipe(folder, amp=name, **fields), tmp_path / name) for name in ("none", amp))
        losses = [[r.training_step(batch_of(seed))["loss"] for seed in range(2)] for r in (exact, run)]
        assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        before = make_run(tiny_recipe(folder), tmp_path / "before").model
        assert not torch.equal(run.model.decoder.cls_emb, before.decoder.cls_emb)
        run.save()
        assert bool(read_checkpoint(tmp_path / amp)["loss_scaler"]) == (amp == "float16")

    def test_an_overflow_of_float16_is_stepped_over(self, folder, tmp_path):
        run = make_run(tiny_recipe(folder, amp="float16"), tmp_path)
        before, scale = weights(run.model), run.scaler.get_scale()
        plain = run.loss

        class Steep(SegmentationLoss):
            def __call__(self, *args):
                return plain(*args) * 1e30

        run.loss = Steep(255)
        assert not math.isfinite(run.training_step(batch_of())["grad_norm"])
        assert differences(weights(run.model), before) == [] and run.scaler.get_scale() == scale / 2
