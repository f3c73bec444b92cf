"""Where time and memory go as sequences get long: patch 8 and growing images, as a table and a figure.

    python examples/long_sequences.py                                     # 257 to 1,601 tokens, seconds on a CPU
    python examples/long_sequences.py --model Seg-S-Mask/8 --sizes 512 1024 2048 --dtype bfloat16

Two ways from an image to the masks of all classes: "score matrices", the published order of work, whose attention takes
memory that grows with the square of the tokens, and "ours" (kernels on a GPU, scaled_dot_product_attention elsewhere).
Weights are random. `python -m bench.profile_long` goes further: traces, rooflines, memory snapshots.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from segmenter import create_segmenter, preset
from segmenter.kernels.reference import explicit_attention
from segmenter.ops import AUTO, EAGER

WAYS = {"score matrices": EAGER._replace(name="published", attention=explicit_attention), "ours": AUTO}
KINDS = {  # what is counted as what, by a part of the operator's name; the first that fits
    "attention": ("attention", "softmax", "bmm"),
    "matrix products": ("mm", "linear", "mlp", "mask_head", "convolution", "mkldnn"),
    "norms and GELU": ("norm", "gelu"),
}


def forward(name: str, size: int, way: str, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One forward pass of a model with random weights, finished when it returns."""
    model = create_segmenter(preset(name, n_cls=19, image_size=size)).eval().to(device, dtype)
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = WAYS[way]
    im = torch.randn(1, 3, size, size, device=device, dtype=dtype)

    def run() -> None:
        with torch.inference_mode():
            model.masks(im)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def peak_mib(run: Callable[[], None], device: torch.device) -> float:
    """MiB that a call needs beyond weights and input."""
    sys.path.append(str(Path(__file__).parents[1]))  # bench/ is not installed, it lies beside examples/
    from bench.timing import peak_bytes

    return (peak_bytes(run, device) or float("nan")) / 2**20


def shares(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Kind of work -> percent of the time of one call."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        run()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(p in event.key for p in parts)), "the rest")
        spent[kind] += event.self_device_time_total if gpu else event.self_cpu_time_total
    return {kind: 100 * spent[kind] / spent.total() for kind in (*KINDS, "the rest")}


def draw(points: dict[str, list[tuple]], split: dict[str, dict[str, float]], path: str) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for column, title in ((1, "ms an image"), (2, "peak memory, MiB")):
        axis = axes[column - 1]
        for way, found in points.items():
            axis.loglog([row[0] for row in found], [row[column] for row in found], "o-", label=way)
        axis.set(xlabel="tokens", title=title)
        axis.set_xticks([row[0] for row in found], [f"{row[0]:,}" for row in found])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(alpha=0.3)
        axis.legend()
    for i, (way, percent) in enumerate(split.items()):
        left = 0.0
        for color, (kind, width) in enumerate(percent.items()):
            axes[2].barh(way, width, left=left, color=f"C{color}", label=None if i else kind)
            left += width
    axes[2].set(xlabel="percent", title=f"where the time goes at {found[-1][0]:,} tokens", xlim=(0, 100))
    axes[2].invert_yaxis()
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Seg-T-Mask/8", help="preset (default: Seg-T-Mask/8)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 192, 320], help="sides of the image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--output", default="long_sequences.png", help="figure (default: long_sequences.png)")
    args = parser.parse_args(argv)

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    points: dict[str, list[tuple]] = {way: [] for way in WAYS}
    split = {}  # of the largest size
    for way, size in tqdm([(way, size) for way in WAYS for size in sorted(args.sizes)], leave=False):
        run = forward(args.model, size, way, device, dtype)
        run()
        start = time.perf_counter()
        run()
        ms = 1000 * (time.perf_counter() - start)
        tokens = (size // preset(args.model).patch_size) ** 2 + 1
        points[way].append((tokens, ms, peak_mib(run, device)))
        split[way] = shares(run, device)

    print("| way | tokens | ms | peak MiB |\n| --- | --- | --- | --- |")
    for way, found in points.items():
        for tokens, ms, memory in found:
            print(f"| {way} | {tokens:,} | {ms:.1f} | {memory:.1f} |")
    draw(points, split, args.output)
    print(f"figure: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
