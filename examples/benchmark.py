"""Times one model, from uint8 pixels to labels, by several implementations, and prints a table.

    python examples/benchmark.py                                            # eager, sdpa and ours; seconds on a CPU
    python examples/benchmark.py --ways eager sdpa compile ours --size 512 --batch 8 --dtype bfloat16

eager: the published order of work, score matrices and full-resolution logits. sdpa: scaled_dot_product_attention in
place of the score matrices. compile: torch.compile of that, which takes a minute or more to compile. ours:
`compile_inference`, kernels and a CUDA graph on a GPU, labels without full-resolution logits everywhere. For figures to
publish use `python -m bench.run_all`: it checks each row before it times it, and keeps what the machine was.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer
from tqdm import tqdm

from segmenter import load_any
from segmenter.config import NORMALIZATION
from segmenter.kernels.reference import explicit_attention, normalized
from segmenter.ops import EAGER

EXAMPLES = Path(__file__).parent
WAYS = ("eager", "sdpa", "compile", "ours")
PUBLISHED = EAGER._replace(name="published", attention=explicit_attention)


def way(name: str, args: argparse.Namespace) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """(pixels (B, H, W, 3) uint8 -> labels (B, H, W), which implementation that is)."""
    dtype = getattr(torch, args.dtype)
    model = load_any(args.model, impl="auto" if name == "ours" else "eager", device=args.device).to(dtype)
    if name == "ours":
        run = model.compile_inference(args.batch, args.size, args.size, window_size=args.size, window_stride=args.size)
        return run, f"{model.impl}, {'CUDA graph' if run.graphs else 'no graph'}"
    if name == "eager":
        for module in model.modules():
            if hasattr(module, "ops"):
                module.ops = PUBLISHED
    mean, std = NORMALIZATION[model.info.normalization]

    def labels(pixels: torch.Tensor) -> torch.Tensor:
        return model(normalized(pixels, mean, std, dtype)).argmax(1).to(torch.uint8)

    run = torch.compile(labels, dynamic=False) if name == "compile" else labels
    return torch.inference_mode()(run), {"compile": "torch.compile"}.get(name, "PyTorch")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=EXAMPLES / "camvid-seg-s-mask-16", help="checkpoint or folder")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[w for w in WAYS if gpu or w != "compile"])
    parser.add_argument("--size", type=int, default=256, help="side of the image (default: 256)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring for each way (default: 1)")
    args = parser.parse_args(argv)

    street = Image.open(EXAMPLES / "street.jpg").convert("RGB").resize((args.size, args.size))
    pixels = torch.from_numpy(np.array(street)).expand(args.batch, -1, -1, -1).contiguous().to(args.device)
    rows: dict[str, tuple[float, torch.Tensor, str]] = {}
    for name in tqdm(args.ways, desc="measuring", leave=False):
        run, what = way(name, args)
        labels = run(pixels).cpu()  # also compiles and warms up
        timer = Timer("run(pixels)", globals={"run": run, "pixels": pixels}, num_threads=torch.get_num_threads())
        rows[name] = (timer.blocked_autorange(min_run_time=args.seconds).median, labels, what)

    first, exact, _ = rows[args.ways[0]]
    print(f"{Path(args.model).name}, {args.size}x{args.size}, batch {args.batch}, {args.dtype}, {args.device}")
    print(f"| way | images/s | vs {args.ways[0]} | same labels | runs on |\n| --- | --- | --- | --- | --- |")
    for name, (time, labels, what) in rows.items():
        same = 100 * (labels == exact).float().mean().item()
        print(f"| {name} | {args.batch / time:.3g} | {first / time:.2f}x | {same:.2f} % | {what} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
