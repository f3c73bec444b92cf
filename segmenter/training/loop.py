"""The training loop: `train` runs a recipe, from its first step or from where the folder's checkpoint left it.

Every step is the same function of (weights, optimiser, step): see `segmenter.data.loader` and `Run.training_step`. That
is what makes a resumed run follow the very same trajectory.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from segmenter.config import ModelConfig
from segmenter.data.augment import Augmentation
from segmenter.data.check import glance
from segmenter.data.datasets import DataError, Dataset, open_dataset
from segmenter.data.loader import Batch, Steps, TrainingSamples, load_batches
from segmenter.inference.precision import DTYPES
from segmenter.model import Segmenter, create_segmenter
from segmenter.training import checkpoint as files
from segmenter.training.distributed import Group
from segmenter.training.initial_model import prepare, starting_model
from segmenter.training.losses import SegmentationLoss, class_weights
from segmenter.training.optimizer import averaged, gradient_norm, make_optimizer
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.training.validation import Validation, report_bad, warn
from segmenter.weights.read import CheckpointError

ONE = Group()


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Outcome(NamedTuple):
    """How a run ended: steps done, of how many, whether a signal stopped it, and the best mIoU on val (or None)."""

    step: int
    total: int
    stopped: bool
    best: float | None


def train(recipe: Recipe, output: str | Path, group: Group = ONE, progress: bool = True) -> Outcome:
    """Trains a model, and goes on with a run that is already in `output`.

    Args:
        recipe: settings, completed here by the data set's published ones.
        output: folder of the run; `segmenter.training.checkpoint` lists what is put there.
        group: this process among those that train together; a group of several is joined and left by the caller.
        progress: a progress bar (of the leading process).
    Raises:
        RecipeError, CheckpointError, ConfigError: settings or weights that cannot be used. DataError: the data set, its
            labels when there is nothing to learn from them, or a sample while bad_samples is "stop". TrainingError:
            loss or gradients are not finite. OSError: the folder cannot be written, or another run goes on in it.

    SIGTERM ends the step, or the evaluation, under way, saves, and returns with `stopped`. So does Ctrl-C; a second one
    interrupts.
    """
    dataset = open_dataset(recipe.data, recipe.split, recipe.kind)
    recipe = recipe.completed(dataset.key)
    output = Path(output)
    notes = [] if os.path.exists(output / files.CHECKPOINT) else glance(dataset)
    with _writing_run(output, group), _stop_signal() as stop:
        run = Run(recipe, dataset, output, group, progress)
        if group.leads:
            warn(notes + (run.validation.shared_with(dataset) if run.validation else []))
        return run.run(stop)


@contextmanager
def _writing_run(output: Path, group: Group) -> Iterator[None]:
    """`writing_run` by the leading process. If it cannot, all processes end: none waits for one that has ended."""
    with ExitStack() as stack:
        error = None
        if group.leads:
            try:
                stack.enter_context(files.writing_run(output))
            except OSError as reason:
                error = reason
        if group.sums([error is not None])[0]:
            raise error or TrainingError("the leading process cannot write into the output folder")
        yield


class Run:
    """Everything a training step changes or reads.

    Attributes:
        model, average: what is trained, and the moving average of its weights or None. step: steps done. total: of all.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, output: Path, group: Group, progress: bool = False):
        if recipe.batch_size % (group.world * recipe.accumulate):
            times = f" times accumulate {recipe.accumulate}" if recipe.accumulate > 1 else ""
            raise RecipeError(
                f"batch_size {recipe.batch_size} must be a multiple of the {group.world} processes{times}"
            )
        self.recipe, self.dataset, self.output, self.group = recipe, dataset, output, group
        self.progress = progress and group.leads
        self.validation = Validation(recipe, group, progress) if recipe.val_split else None
        self.per_epoch = Steps.per_epoch(len(dataset), recipe.batch_size)
        self.total = recipe.epochs * self.per_epoch
        checkpoint = output / files.CHECKPOINT
        state = files.load_state(checkpoint, recipe.to_dict()) if os.path.exists(checkpoint) else None
        self.model = self._model(state).to(group.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = make_optimizer(self.model, recipe, self.total)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.amp == "float16")
        self.average = averaged(self.model, recipe.ema) if recipe.ema else None
        self.step, self.evaluated_at, self.best, self.bad, self.reported = 0, 0, None, 0, set[str]()
        self.class_weights = None
        if state is not None:
            self._restore(state)
        elif recipe.class_weighting:
            self.class_weights = class_weights(dataset, recipe.class_weighting, self.progress)
        if group.sums([self.step])[0] != self.step * group.world:
            raise CheckpointError(f"{checkpoint}: the processes find different ones; let them share the output folder")
        weight = None if self.class_weights is None else self.class_weights.to(group.device)
        of_pixels = (self.model.patch_size, recipe.impl)
        self.loss = SegmentationLoss(dataset.ignore_index, weight, recipe.loss_terms(), *of_pixels)
        self.parallel = group.parallel(_Masks(self.model))

    def run(self, stop: threading.Event) -> Outcome:
        """All steps that are left, with evaluations and saves between them."""
        leads = self.group.leads
        if leads:
            files.write_yaml(self.output / files.RECIPE, self.recipe.to_dict())
            files.write_yaml(self.output / files.VARIANT, self._variant_yml())
        log = files.Log(self.output, self.step, self.recipe.tensorboard) if leads else None
        bar = tqdm(total=self.total, initial=self.step, desc="training", unit="step", disable=not self.progress)
        meter, stopped, saved = _Meter(), False, time.monotonic()
        with bar:
            if self.progress:
                bar.write(f"loss: {self.loss.implementations(self.trained[0])}")
            self._evaluate_if_due(log, bar)  # what a run that was killed had still to do
            for batch in self._batches():
                meter.add(self.training_step(batch))
                bar.update()
                bar.set_postfix(loss=f"{meter.loss:.3f}", refresh=False)
                last = self.step == self.total
                if log and (last or self.step % self.recipe.log_steps == 0):
                    log.write(self.step, {"epoch": self.epoch, **meter.take(self.recipe.batch_size), "bad": self.bad})
                stopped = bool(self.group.sums([stop.is_set()])[0])
                pause = time.monotonic()
                if last or stopped or self._evaluates() or pause - saved > 60 * self.recipe.save_minutes:
                    self.save()  # before an evaluation, in which things can go wrong
                    saved = time.monotonic()
                if stopped and not last:
                    break
                if self._evaluate_if_due(log, bar):
                    self.save()
                meter.leave_out(time.monotonic() - pause)
        if log:
            log.close()
        if self.step == self.total and leads:
            self.save_model(files.FINAL)
        self.group.wait()
        return Outcome(self.step, self.total, stopped and self.step < self.total, self.best)

    @property
    def epoch(self) -> int:
        """Epochs done, the one under way not counted."""
        return self.step // self.per_epoch

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model that is evaluated and saved: the average, if there is one."""
        return self.model if self.average is None else self.average.module

    def training_step(self, batch: Batch) -> dict[str, float]:
        """One update of the weights.

        Returns:
            loss (of all processes), lr, grad_norm (before clipping).
        Raises:
            TrainingError: loss or gradients are not finite; nothing is changed then. DataError: samples that cannot be
                read, if they are to stop the run.
        """
        recipe, group = self.recipe, self.group
        torch.manual_seed((recipe.seed * 1_000_003 + self.step) * 1_009 + group.rank)  # dropout, stochastic depth
        images = batch.images.to(group.device, non_blocking=True)
        labels = batch.labels.to(group.device, non_blocking=True)
        counted, bad = group.sums([self.loss.denominator(labels).item(), len(batch.errors)])
        if bad and recipe.bad_samples == "stop":  # in every process: none waits for one that has ended
            raise DataError(batch.errors[0] if batch.errors else "another process has a sample that cannot be read")
        report_bad(batch.errors, self.reported)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._add_gradients(images, labels, counted / group.world)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.trained, recipe.clip_grad)
        value, norm = torch.stack([loss, norm]).tolist()  # the one time that the device is waited for
        value = group.sums([value])[0] / group.world
        self._check_finite(value, norm, batch)
        lr = self.optimizer.param_groups[-1]["lr"]
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else float16 has overflowed, and there was no update
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.bad += int(bad)
        return {"loss": value, "lr": lr, "grad_norm": norm}

    def _add_gradients(self, images: torch.Tensor, labels: torch.Tensor, denominator: float) -> torch.Tensor:
        """The loss of a batch, whose gradients are added to those of the parameters, a part of it after another."""
        parts, dtype = self.recipe.accumulate, DTYPES.get(self.recipe.amp, torch.float32)
        total = torch.zeros((), device=images.device)
        for i, (some, of_some) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            with self.group.exchanging(self.parallel, i + 1 == parts):
                with torch.autocast(images.device.type, dtype=dtype, enabled=self.recipe.amp != "none"):
                    masks = self.parallel(some)
                loss = self.loss(masks, of_some, denominator, 1 / parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _check_finite(self, loss: float, norm: float, batch: Batch) -> None:
        if not math.isfinite(loss):
            what = f"the loss is {loss}"
        elif math.isfinite(norm) or self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return  # the scaler leaves out a step whose scaled gradients overflow, and lowers its scale
        else:
            what = f"the norm of the gradients is {norm}"
        raise TrainingError(
            f"{what} at step {self.step}, of the samples {', '.join(batch.names)}; the last checkpoint is as it was. "
            "Try a lower learning_rate, warmup_steps, clip_grad, or amp bfloat16 in place of float16, in another folder"
        )

    def save(self) -> None:
        """Replaces the folder's checkpoint."""
        if not self.group.leads:
            return
        average = None if self.average is None else self.average.state_dict()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "n_cls": self.model.n_cls,
            "lr_scheduler": self.schedule.state_dict(),
            "loss_scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "config": self.model.config.to_dict(),
            "class_weights": self.class_weights,
            "average": average,
            "best": self.best,
            "bad": self.bad,
            "recipe": self.recipe.to_dict(),
        }
        files.save_state(self.output / files.CHECKPOINT, state)

    def save_model(self, name: str) -> None:
        """Puts the model into a folder of the run that `load_model` reads."""
        self.evaluated.save_pretrained(self.output / name, classes=self.dataset.classes)

    def _model(self, state: dict[str, Any] | None) -> Segmenter:
        """What training starts from, or goes on with, for which nothing but the checkpoint is needed."""
        if state is not None:
            config = ModelConfig.from_dict(state["config"])
            return prepare(create_segmenter(config, self.recipe.impl), self.recipe, self.dataset)
        torch.manual_seed(self.recipe.seed)
        return starting_model(self.recipe, self.dataset)

    def _restore(self, state: dict[str, Any]) -> None:
        if (total := state["lr_scheduler"]["iter_max"]) != self.total:  # of which order, rates and epochs follow
            raise CheckpointError(
                f"{self.output / files.CHECKPOINT}: its run has {total} steps, but {len(self.dataset)} images make "
                f"{self.total}; bring back the data set as it was, or start in another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["lr_scheduler"])
        self.scaler.load_state_dict(state["loss_scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.evaluated_at = state["step"], state["evaluated_at"]
        self.best, self.bad, self.class_weights = state["best"], state["bad"], state["class_weights"]

    def _batches(self) -> Iterator[Batch]:
        recipe, group = self.recipe, self.group
        augmentation = Augmentation(
            crop_size=recipe.crop_size,
            im_size=recipe.im_size,
            max_ratio=recipe.max_ratio,
            scale=recipe.scale,
            normalization=self.model.info.normalization,
            ignore_index=self.dataset.ignore_index,
            cat_max_ratio=recipe.cat_max_ratio,
            flip=recipe.flip,
            photometric=recipe.photometric,
        )
        samples = TrainingSamples(self.dataset, augmentation, recipe.seed)
        of_steps = (len(self.dataset), recipe.batch_size, recipe.seed, self.step, self.total, group.rank, group.world)
        yield from load_batches(samples, Steps(*of_steps), recipe.workers, pin_memory=group.device.type == "cuda")

    def _evaluates(self) -> bool:
        """Whether an evaluation is due at this step."""
        if self.validation is None or self.step == self.evaluated_at or self.step % self.per_epoch:
            return False
        return self.step == self.total or self.epoch % self.recipe.eval_freq == 0

    def _evaluate_if_due(self, log: "files.Log | None", bar: tqdm) -> bool:
        if not self._evaluates():
            return False
        self.evaluated_at = self.step
        scores = self.validation(self.evaluated, self.output / files.OVERLAYS, self.step)
        best = self.best is None or math.isnan(self.best) or scores["val_mIoU"] > self.best
        if best:
            self.best = scores["val_mIoU"]
        if log is not None:
            log.write(self.step, {"epoch": self.epoch, **scores})
        if best and self.group.leads:
            self.save_model(files.BEST)
        if self.progress:
            line = f"epoch {self.epoch}: val mIoU {scores['val_mIoU']:.2f}, pixel accuracy {scores['val_aAcc']:.2f}"
            bar.write(line + (" (best so far)" if best else ""))
        return True

    def _variant_yml(self) -> dict[str, Any]:
        from segmenter.weights.settings import as_published

        content = as_published(self.model)
        im_size = self.recipe.im_size or self.recipe.crop_size
        content["dataset_kwargs"] |= {
            "dataset": self.dataset.key,
            "image_size": im_size,
            "crop_size": self.recipe.crop_size,
        }
        content["inference_kwargs"]["im_size"] = im_size
        return content


class _Masks(torch.nn.Module):
    """The model, for its masks: DistributedDataParallel calls `forward`, and the model's makes the pixels' logits."""

    def __init__(self, model: Segmenter):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.masks(images)


class _Meter:
    """Means since the last line of the log."""

    def __init__(self):
        self.loss = math.nan  # running mean, for the progress bar
        self._reset()

    def _reset(self) -> None:
        self._facts: list[dict[str, float]] = []
        self._since = time.monotonic()

    def add(self, facts: dict[str, float]) -> None:
        self.loss = facts["loss"] if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * facts["loss"]
        self._facts.append(facts)

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on other things than steps."""
        self._since += seconds

    def take(self, batch_size: int) -> dict[str, float]:
        facts, seconds = self._facts, max(time.monotonic() - self._since, 1e-9)
        self._reset()
        means = {name: sum(fact[name] for fact in facts) / len(facts) for name in ("loss", "grad_norm")}
        speed = len(facts) * batch_size / seconds
        return {**means, "lr": facts[-1]["lr"], "seconds": round(seconds, 3), "images_per_second": round(speed, 3)}


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, and Ctrl-C, which after that interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
