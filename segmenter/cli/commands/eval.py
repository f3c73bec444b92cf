"""`segmenter eval`: scores of a model on a data set."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import segmenter
from segmenter.cli.errors import DEVICE, FAILURE, SOME_FAILED, CommandError
from segmenter.cli.loading import choose_classes, load
from segmenter.cli.output import out
from segmenter.cli.records import Facts, Records, sample_facts
from segmenter.cli.report import Tally, say, write_failed
from segmenter.cli.resume import model_fingerprint
from segmenter.cli.scores import print_scores, report, write_scores
from segmenter.cli.shards import Shard, run_part
from segmenter.data.datasets import PUBLISHED, DataError, Dataset, Sample, open_dataset
from segmenter.evaluation.charts import can_draw, comparison
from segmenter.evaluation.evaluate import MULTISCALE, OVERLAP, Outcome, Protocol, outcomes
from segmenter.evaluation.metrics import ConfusionMatrix
from segmenter.files import remove_leftovers
from segmenter.inference.precision import resolve_dtype
from segmenter.model import Segmenter
from segmenter.visualize import save_png

OVERLAYS = "overlays"  # below the output folder


@dataclass
class Evaluation:
    """What all images of a run share, and how far it is.

    Attributes:
        settings: all that the counts depend on besides the images, for --resume.
        overlays: name of a sample -> the overlay to draw of it. skip: samples that need not be done again.
    """

    args: argparse.Namespace
    model: Segmenter
    dataset: Dataset
    protocol: Protocol
    settings: dict[str, Any]
    overlays: dict[str, Path]
    skip: set[str] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)


def run(args: argparse.Namespace) -> int:
    if args.chart and not can_draw():
        raise CommandError("the chart needs matplotlib: pip install 'segmenter-triton[train]', or say --no-chart")
    shard, output = Shard.of_this_process(), Path(args.output)
    job = prepare(args, shard)
    with shard.writing_into(output):
        remove_leftovers(output / OVERLAYS)
        return _run(job, shard, output)


def _run(job: Evaluation, shard: Shard, output: Path) -> int:
    args = job.args
    resume = args.resume or shard.restarts > 0
    records = Records(output, job.dataset, args.boundary, job.settings, shard.rank, shard.world, keep=resume)
    if resume:
        job.skip = _usable(records, job, quiet=shard.rank > 0)
    names = [sample.name for sample in job.dataset.samples]
    return run_part(
        shard,
        args.output,
        names,
        job.settings,
        job.tally,
        do=lambda: _do(shard, job, records),
        report=lambda tally, seconds: _finish(job, records, tally, seconds, shard.world),
    )


def prepare(args: argparse.Namespace, shard: Shard) -> Evaluation:
    """Opens data set and model, and checks that they go together before time is spent.

    Raises:
        CommandError: either cannot be used, or their numbers of classes differ.
    """
    try:
        dataset = open_dataset(args.data, args.split, args.kind)
    except DataError as error:
        raise CommandError(str(error)) from error
    device = shard.device(args.device)
    model = load(args, device, quiet=shard.rank > 0)
    _check_classes(model, dataset, quiet=shard.rank > 0)
    try:
        protocol = choose_protocol(args, dataset).of_model(model, dataset.key)
    except ValueError as error:
        raise CommandError(str(error)) from error
    compute_type = resolve_dtype(protocol.dtype, device, next(model.parameters()).dtype)
    what = asdict(protocol) | {"scales": list(protocol.scales), "dtype": str(compute_type).removeprefix("torch.")}
    del what["batch_size"]  # changes the speed alone
    settings = {
        "version": segmenter.__version__,
        "data": [dataset.key, dataset.split, dataset.n_cls, asdict(dataset.ids)],
        "protocol": what,
        "model_crc32": model_fingerprint(model),
        "impl": model.impl,
        "device": device.type,
    }
    samples = dataset.spread(args.overlays) if args.overlays else ()
    directory = Path(args.output) / OVERLAYS
    overlays = {sample.name: directory / f"{sample.name}.png" for sample in samples}
    return Evaluation(args, model, dataset, protocol, settings, overlays)


def choose_protocol(args: argparse.Namespace, dataset: Dataset) -> Protocol:
    """What the options say, and else what was published for the data set; its images' own size if nothing was."""
    published = PUBLISHED.get(dataset.key)
    im_size = args.im_size or (published.im_size if published else None)
    max_ratio = args.max_ratio or (published.max_ratio if published else Protocol.max_ratio)
    return Protocol(
        im_size=None if im_size == "own" else im_size,
        max_ratio=max_ratio,
        window_size=args.window_size,
        window_stride=args.window_stride,
        scales=MULTISCALE if args.multiscale else args.scales,
        flip=args.flip or args.multiscale,
        batch_size=args.batch_size,
        dtype=args.dtype,
    )


def windows_in_words(args: argparse.Namespace, protocol: Protocol, dataset: Dataset) -> str:
    """Which windows and stride there were, and whose choice they are."""
    size, stride = protocol.window_size, protocol.window_stride
    whose = "as the model says"
    if args.window_stride is not None:
        whose = "as asked for"
    elif dataset.key in PUBLISHED and stride == size - OVERLAP:
        whose = f"as published for {dataset.key}"
    return f"windows of {size} x {size} pixels every {stride} pixels ({whose})"


def _check_classes(model: Segmenter, dataset: Dataset, quiet: bool) -> None:
    if model.n_cls != dataset.n_cls:
        raise CommandError(
            f"the model has {model.n_cls} classes, the data set {dataset.root} ({dataset.key}) {dataset.n_cls}; "
            "they must be the same ones: choose another --model, --data or --kind"
        )
    classes = choose_classes(None, model)
    if quiet or classes.name == "generic":  # nothing is known of the model's
        return
    pairs = list(zip(classes.names, dataset.classes.names, strict=True))
    other = [i for i, (ours, theirs) in enumerate(pairs) if ours.casefold() != theirs.casefold()]
    if other:
        i, (ours, theirs) = other[0], pairs[other[0]]
        warnings.warn(
            f"{len(other)} of {dataset.n_cls} classes are called differently, the first is {i}: {ours!r} in the model "
            f"and {theirs!r} in the data set; if they do not mean the same, the scores mean nothing",
            stacklevel=2,
        )


def _usable(records: Records, job: Evaluation, quiet: bool) -> set[str]:
    """Samples that are recorded and have their overlay, if they get one."""
    names, useless = records.done()
    if useless and not quiet:
        warnings.warn(
            f"{useless} records in {records.directory} are of other settings, of images that have changed, or cut "
            "off; such images are done again",
            stacklevel=2,
        )
    return {name for name in names if name not in job.overlays or job.overlays[name].is_file()}


def _do(shard: Shard, job: Evaluation, records: Records) -> None:
    """Each sample of this process is skipped, recorded, or noted as failed."""
    args, dataset = job.args, job.dataset
    mine = shard.part(dataset.samples)
    places = {sample.name: place for place, sample in mine}
    facts: dict[str, Facts] = {}
    running = ConfusionMatrix(dataset.n_cls, dataset.ignore_index)

    def wanted() -> Iterator[Sample]:
        for _, sample in mine:
            if sample.name in job.skip:
                job.tally.skipped += 1
                bar.update()
            else:
                facts[sample.name] = sample_facts(sample)  # before reading: if it changes meanwhile, it is done again
                yield sample

    def draw(outcome: Outcome) -> None:
        if outcome.sample.name in job.overlays:
            _write_overlay(outcome, dataset, job.overlays[outcome.sample.name])

    options = {"boundary": args.boundary, "workers": args.workers, "cuda_graphs": args.cuda_graphs}
    stream = outcomes(job.model, dataset, job.protocol, wanted(), also=draw, **options)
    no_bar = shard.rank > 0 or None  # None: no bar unless on a terminal
    with tqdm(total=len(mine), unit="image", file=sys.stderr, disable=no_bar) as bar, contextlib.closing(stream):
        try:
            for outcome in stream:
                sample = outcome.sample
                if outcome.error is not None:
                    if args.bad_samples == "stop":
                        raise CommandError(f"{outcome.error} (--bad-samples skip goes on without it)", SOME_FAILED)
                    job.tally.failed[places[sample.name]] = {"image": str(sample.image), "error": str(outcome.error)}
                else:
                    records.add(sample, facts.pop(sample.name), outcome.counts)
                    job.tally.done += 1
                    running.merge(outcome.counts.matrix)
                    bar.set_postfix_str(f"mIoU {100 * running.scores()['mIoU']:.2f}", refresh=False)
                bar.update()
        except torch.OutOfMemoryError as error:
            text = "not enough memory; use a smaller --batch-size or --window-size, --dtype auto, or --device cpu"
            raise CommandError(text, DEVICE) from error
        except ValueError as error:  # an image that grows too large, or scores that are not finite
            raise CommandError(str(error), FAILURE) from error


def _write_overlay(outcome: Outcome, dataset: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    maps = outcome.pixels, outcome.label, outcome.prediction
    save_png(comparison(*maps, dataset.classes, dataset.ignore_index), path)


def _finish(job: Evaluation, records: Records, tally: Tally, seconds: float, processes: int) -> None:
    """Sums the records of all processes, and writes and prints the scores.

    Raises:
        CommandError: an image is neither recorded nor noted as failed.
    """
    counts, names = records.total()
    failed = {job.dataset.samples[place].name for place in tally.failed}
    lost = [sample.name for sample in job.dataset.samples if sample.name not in names | failed]
    if lost:
        raise CommandError(
            f"{len(lost)} images have no record, the first is {lost[0]}: they changed, or {records.directory} did, "
            "while the run went on; run again with --resume",
            FAILURE,
        )
    run_facts = {"seconds": round(seconds, 1), "processes": processes, "skipped": tally.skipped}
    data = report(job.args, job.model, job.dataset, job.settings, counts, len(failed), run_facts)
    output = Path(job.args.output)
    write_scores(data, job.dataset.classes, counts, output, job.args.chart)
    write_failed(tally, output)
    print_scores(data)
    say(tally, len(job.dataset), seconds, job.args.output, processes=processes)
    out(windows_in_words(job.args, job.protocol, job.dataset))
