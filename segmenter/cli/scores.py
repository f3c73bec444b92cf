"""The results of `segmenter eval`: a table for people, JSON, YAML and a chart in the output folder."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import yaml

import segmenter
from segmenter.classes import ClassSet
from segmenter.cli.output import out
from segmenter.cli.report import write_json
from segmenter.data.datasets import Dataset
from segmenter.evaluation.charts import save_class_chart
from segmenter.evaluation.evaluate import Counts
from segmenter.evaluation.metrics import percent
from segmenter.files import write_text
from segmenter.model import Segmenter

MEANS = ("mIoU", "mAcc", "aAcc", "bF", "bIoU")
PER_CLASS = {"IoU": "IoU", "Acc": "Acc", "bF": "bF_per_class", "bIoU": "bIoU_per_class"}  # ours -> of the metrics


def report(
    args: argparse.Namespace,
    model: Segmenter,
    dataset: Dataset,
    settings: dict[str, Any],
    counts: Counts,
    failed: int,
    run: dict[str, Any],
) -> dict[str, Any]:
    """All that there is to say about an evaluation, as JSON: percentages with two decimals, None where 0/0.

    What differs from run to run of the same evaluation is under "run", all else does not.
    """
    scores = percent(counts.scores())
    columns = {ours: scores[name] for ours, name in PER_CLASS.items() if name in scores}
    rows = enumerate(dataset.classes.names)
    return {
        "data": {
            "root": str(dataset.root),
            "kind": dataset.key,
            "split": dataset.split,
            "pictures": counts.images,
            "failed": failed,
        },
        "model": {
            "path": args.model,
            "weights": model.info.weights,
            "source": model.info.source,
            "crc32": settings["model_crc32"],
            "impl": settings["impl"],
        },
        "protocol": settings["protocol"],
        "scores": {name: _number(scores[name]) for name in MEANS if name in scores},
        "classes": [
            {"id": i, "name": name, **{column: _number(values[i]) for column, values in columns.items()}}
            for i, name in rows
        ],
        "run": run
        | {
            "device": _device_name(model),
            "versions": {
                "segmenter": segmenter.__version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
        },
    }


def write_scores(data: dict[str, Any], classes: ClassSet, counts: Counts, output: Path, chart: bool) -> None:
    """Writes scores.json, scores.yml and, if wanted, per_class.png."""
    write_json(output / "scores.json", data)
    text = yaml.safe_dump(data, sort_keys=False, width=120)
    write_text(output / "scores.yml", text)
    if chart:
        where = f"{data['data']['kind']} {data['data']['split']}, {counts.images} images"
        title = f"mIoU {_cell(data['scores']['mIoU']).strip()} %   {where}"
        save_class_chart(output / "per_class.png", classes, counts.matrix.scores()["IoU"], title)


def print_scores(data: dict[str, Any]) -> None:
    """A table of the classes, and a line of the means, in percent."""
    columns = [name for name in PER_CLASS if name in data["classes"][0]]
    width = max(len("class"), *(len(row["name"]) for row in data["classes"]))
    out(f"{'id':>3} {'class':<{width}}" + "".join(f"{name:>8}" for name in columns))
    for row in data["classes"]:
        out(f"{row['id']:>3} {row['name']:<{width}}" + "".join(_cell(row[name]) for name in columns))
    out("  ".join(f"{name} {_cell(value).strip()}" for name, value in data["scores"].items()))


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>8}"


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def _device_name(model: Segmenter) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
