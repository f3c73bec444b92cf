"""What a smaller patch gives and costs: the models of examples/camvid-sisters, which differ in their patch alone.

python -m bench.patch_sizes             times them, writes bench/results/patch_sizes.json, prints the table of the pages
python -m bench.patch_sizes --table     only the table, of that file and each model's scores.yml

Time is that of `model.segment`, from the pixels of a 480x360 image, the size of CamVid's, to its labels; models take
turns, so that other work on the machine meets all of them. Peak memory is what a call needs beyond the loaded model.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from bench import machine, timing
from segmenter.files import write_text
from segmenter.inference.windows import resized_shape, windows_of
from segmenter.model import Segmenter
from segmenter.weights.load import from_pretrained

SISTERS = machine.ROOT / "examples" / "camvid-sisters"
RESULTS = machine.ROOT / "bench" / "results" / "patch_sizes.json"
FOLDERS = tuple(SISTERS / f"seg-s-mask-{patch}" for patch in (32, 16, 8))
SIZE = (480, 360)  # (width, height) of CamVid's images
HEAD = "| patch | tokens | mIoU | boundary F | boundary IoU | mIoU before int8 | ms | peak memory | weights |"


def tokens(model: Segmenter, height: int, width: int) -> int:
    """Patches of all windows of an image, class tokens not counted."""
    size, stride, P = model.info.window_size, model.info.window_stride, model.patch_size
    return windows_of(resized_shape(height, width, size), size, stride, P).tokens(P)


def measured(folders: Sequence[Path], image: np.ndarray, repeats: int, device: torch.device) -> dict[str, Any]:
    """Tokens, median milliseconds with their spread, and peak bytes of each model for an image (H, W, 3) uint8."""
    models = {folder.name: from_pretrained(folder, device=device) for folder in folders}
    calls = {name: lambda model=model: model.segment(image) for name, model in models.items()}
    for call in calls.values():
        call(), call()
    peaks = {name: timing.peak_bytes(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(repeats), desc="rounds", file=sys.stderr, disable=None):
        for name, call in calls.items():
            times[name].append(timing.wall_seconds(call, device))
    return {
        name: {
            "patch_size": model.patch_size,
            "tokens": tokens(model, *image.shape[:2]),
            "milliseconds": round(1000 * statistics.median(times[name]), 2),
            "spread": round(timing.spread(times[name]) or 0, 3),
            "peak_bytes": peaks[name],
        }
        for name, model in models.items()
    }


def table(directory: Path, results: Path) -> str:
    """The table of the pages, in Markdown: models by falling patch size, scores of the whole test set in percent.

    Args:
        directory: of the models' folders, each with its scores. results: what was measured of them.
    """
    costs = json.loads(results.read_text(encoding="utf-8"))["models"]
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for name, cost in sorted(costs.items(), key=lambda item: -item[1]["patch_size"]):
        scores, before = (_scores(directory / name / file) for file in ("scores.yml", "scores_float32.yml"))
        peak = "not seen" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 1e6:.0f} MB"
        weights = (directory / name / "model.safetensors").stat().st_size
        found = [f"{scores[key]:.2f}" for key in ("mIoU", "bF", "bIoU")]
        found += [f"{before['mIoU']:.2f}", f"{cost['milliseconds']:.0f}", peak, f"{weights / 1e6:.1f} MB"]
        lines.append(f"| {cost['patch_size']} | {cost['tokens']:,} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def _scores(path: Path) -> dict[str, float]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["scores"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--repeats", type=int, default=21, help="timed calls of each model (default: 21)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not args.table:
        device = torch.device(args.device)
        street = Image.open(machine.ROOT / "examples" / "street.jpg").convert("RGB").resize(SIZE)
        look = machine.sampling(device)
        found = measured(FOLDERS, np.array(street), args.repeats, device)
        facts = machine.facts(device) | {"at_work": look()}
        content = {"machine": facts, "size": list(SIZE), "repeats": args.repeats, "models": found}
        write_text(RESULTS, json.dumps(content, indent=2) + "\n")
    print(table(SISTERS, RESULTS), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
