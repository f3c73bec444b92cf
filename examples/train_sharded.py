"""Training steps of a loop of one's own: weights split among processes by FSDP2, or a step compiled as one graph.

    python examples/train_sharded.py --compile
    torchrun --nproc-per-node 2 examples/train_sharded.py --impl auto

`segmenter train` needs neither: it has every weight on every GPU. The images are crops of the shipped photograph, the
labels how bright they are; what is shown is the wiring, and that the loss does not depend on the number of processes.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from segmenter.config import preset
from segmenter.inference.images import normalize, read_image
from segmenter.model import create_segmenter
from segmenter.training.distributed import Group, shard
from segmenter.training.losses import SegmentationLoss

EXAMPLES = Path(__file__).parent
CLASSES = 5


def batch(photograph: torch.Tensor, size: int, count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops (count, 3, size, size) and labels (count, size, size), the same in every process."""
    generator = torch.Generator().manual_seed(step)
    corners = [torch.randint(0, n - size, (count,), generator=generator).tolist() for n in photograph.shape[-2:]]
    crops = [photograph[:, y : y + size, x : x + size] for y, x in zip(*corners, strict=True)]
    images = torch.stack(crops)
    return images, (images.mean(1) * 1.5 + 2).clamp(0, CLASSES - 1).long()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Seg-T-Mask/16", help="a preset")
    parser.add_argument("--size", type=int, default=64, help="side of the crops, a multiple of the patch")
    parser.add_argument("--batch-size", type=int, default=2, help="of all processes together")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--impl", choices=("eager", "triton", "auto"), default="auto")
    parser.add_argument("--recompute", type=int, choices=range(4), default=1)
    parser.add_argument("--compile", action="store_true", help="model and loss as one graph; of one process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.compile and world > 1:
        parser.error("--compile has only been tried with one process")
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", "0")) if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = Group(rank, world, device)
    group.join()
    torch.manual_seed(0)  # the same weights everywhere
    config = preset(args.model, n_cls=CLASSES, image_size=args.size, drop_path_rate=0.0)
    model = create_segmenter(config, args.impl).to(device).train().recompute(args.recompute)
    for module in model.modules():  # what is drawn at random would depend on the number of processes
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if world > 1:
        shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loss = SegmentationLoss(255, patch_size=model.patch_size, impl=args.impl)

    def total(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(model.masks(images), labels, 1.0)

    if args.compile:  # what it is divided by differs from step to step, so that stays outside
        total = torch.compile(total, fullgraph=True)
    photograph = normalize(read_image(EXAMPLES / "street.jpg"), model.info.normalization)
    for step in range(args.steps):
        images, labels = (t.chunk(world)[rank].to(device) for t in batch(photograph, args.size, args.batch_size, step))
        pixels = group.sums([labels.numel()])[0]
        optimizer.zero_grad(set_to_none=True)
        value = total(images, labels) / (pixels / world)
        value.backward()
        optimizer.step()
        mean = group.sums([value.item()])[0] / world
        if group.leads:
            print(f"step {step + 1}: loss {mean:.6f}")
    group.leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
