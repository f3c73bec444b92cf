"""Puts the kernels into a model in place, and shows what changes: labels, time, and which implementation runs.

    python examples/drop_in.py                                        # the shipped model on the shipped photograph
    python examples/drop_in.py --model Seg-B-Mask/16 --n-cls 150 --device cuda --dtype bfloat16

With a model of your own, replace `load_any` by whatever builds it; `accelerate` takes official Segmenters, timm's
vision transformers and mmsegmentation's Segmenter. Without a GPU the kernels cannot run: eager PyTorch runs both times.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import segmenter

EXAMPLES = Path(__file__).parent


def seconds(model: torch.nn.Module, image: Path, dtype: str | None, repeats: int) -> float:
    """Mean seconds from the file to its labels."""
    names = {"model": model, "image": image, "dtype": dtype}
    return (
        Timer("model.segment(image, dtype=dtype)", globals=names, num_threads=torch.get_num_threads())
        .timeit(repeats)
        .mean
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EXAMPLES / "camvid-seg-s-mask-16", help="checkpoint, folder or preset")
    parser.add_argument("--n-cls", type=int, help="classes, for presets and encoders")
    parser.add_argument("--image", type=Path, default=EXAMPLES / "street.jpg")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)

    request = {} if args.n_cls is None else {"n_cls": args.n_cls}
    model = segmenter.load_any(args.model, impl="eager", device=args.device, **request)
    before, labels = model.impl, model.segment(args.image, dtype=args.dtype)
    slow = seconds(model, args.image, args.dtype, args.repeats)

    report = segmenter.accelerate(model)
    after, fast_labels = model.impl, model.segment(args.image, dtype=args.dtype)
    fast = seconds(model, args.image, args.dtype, args.repeats)
    segmenter.restore(model)

    print(report)
    same = (labels == fast_labels).float().mean().item()
    print(f"\n{args.image.name} on {args.device}, {args.dtype or 'the type of the weights'}")
    print(f"before: {1000 * slow:9.1f} ms  {before}")
    print(f"after:  {1000 * fast:9.1f} ms  {after}")
    print(f"{100 * same:.2f} % of the labels are the same")
    print(f"speed: {slow / fast:.2f}x" if after != before else f"{after} ran both times: a difference in time is noise")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
