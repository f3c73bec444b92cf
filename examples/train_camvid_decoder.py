"""Trains a Segmenter decoder for street scenes on a frozen, pretrained ViT-S. Runs on a laptop CPU in 25 minutes.

    python examples/train_camvid_decoder.py --data CAMVID --weights ENCODER.safetensors --output FOLDER

CAMVID holds images/{train,val,test}/NAME.webp and annotations/{train,val,test}/NAME.png with class ids 0..10 and 11
for unlabelled pixels. ENCODER.safetensors is a ViT-S/14 with timm's names and LayerScale folded in (37 x 37 positions).

The encoder never changes, so it runs once over a few augmented copies of each training picture and its features are
kept in memory; the decoder and the encoder's last LayerNorm are then trained on those. Features are taken after block
9 of 12, where a linear probe of this encoder scores best, and the other blocks are left out of the saved model.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from tqdm import tqdm

from segmenter.config import ModelConfig
from segmenter.layers import resize_pos_embed
from segmenter.model import Segmenter, create_segmenter

NAMES = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()
VOID = 11
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_model(weights: Path, args: argparse.Namespace) -> Segmenter:
    """Segmenter with the pretrained encoder, patch 16, cut after `args.layers` blocks, and a random decoder."""
    decoder = {"name": "linear"}
    if args.decoder == "mask_transformer":
        decoder = {"name": "mask_transformer", "n_layers": args.decoder_layers, "dropout": 0.0, "drop_path_rate": 0.1}
    config = ModelConfig.from_dict(
        {
            "backbone": "vit_small_patch14_dinov2",
            "image_size": args.window,
            "patch_size": 16,
            "d_model": 384,
            "n_heads": 6,
            "n_layers": args.layers,
            "n_cls": len(NAMES),
            "normalization": "deit",
            "drop_path_rate": 0.0,
            "decoder": decoder,
            "norm_eps": 1e-6,
            "pos_embed_mode": "bicubic",
            "pos_embed_check": "grid",
        }
    )
    model = create_segmenter(config)
    model.encoder.load_state_dict(encoder_weights(weights, config))
    return model


def encoder_weights(weights: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The pretrained ViT-S/14 as a float32 encoder state dict for `config`: fewer blocks, patch 16, its own grid."""
    from safetensors.torch import load_file
    from timm.layers import resample_patch_embed

    state = {name: value.float() for name, value in load_file(weights).items()}
    for name in list(state):
        if name.startswith("blocks.") and int(name.split(".")[1]) >= config.n_layers:
            del state[name]
    kernel = state["patch_embed.proj.weight"]
    patch = (config.patch_size, config.patch_size)
    state["patch_embed.proj.weight"] = resample_patch_embed(kernel, patch, interpolation="bicubic", antialias=True)
    grid = tuple(side // config.patch_size for side in config.image_size)
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], None, grid, 1, config.pos_embed_mode)
    state["head.weight"], state["head.bias"] = torch.zeros(1000, config.d_model), torch.zeros(1000)
    return state


def read(data: Path, split: str) -> list[tuple[Image.Image, Image.Image]]:
    """All (picture, label) pairs of a split, in name order."""
    paths = sorted((data / "images" / split).glob("*.webp"))
    if not paths:
        raise SystemExit(f"no pictures found in {data / 'images' / split}; --data must be the CamVid folder")
    labels = [data / "annotations" / split / f"{path.stem}.png" for path in paths]
    return [(Image.open(p).convert("RGB"), Image.fromarray(np.array(Image.open(q)))) for p, q in zip(paths, labels, strict=True)]


def augment(image: Image.Image, label: Image.Image, window: int, max_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A random window of a picture whose short side is at least the window, flipped and with other light at random.

    Returns:
        Normalised image (3, window, window) and labels (window / 2, window / 2), uint8. Half the resolution is close
        to that of the annotations and makes the loss four times cheaper.
    """
    scale = window / min(image.size) * random.uniform(1.0, max_scale)
    size = [max(window, round(side * scale)) for side in image.size]
    left, top = (random.randint(0, side - window) for side in size)
    box = [left / size[0], top / size[1], (left + window) / size[0], (top + window) / size[1]]
    box = [part * side for part, side in zip(box, image.size * 2, strict=True)]
    image = image.resize((window, window), Image.Resampling.BILINEAR, box)
    label = label.resize((window // 2, window // 2), Image.Resampling.NEAREST, box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(random.uniform(0.6, 1.4))
    pixels, labels = np.array(image), np.array(label)
    if random.random() < 0.5:
        pixels, labels = pixels[:, ::-1].copy(), labels[:, ::-1].copy()
    im = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return (im - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), torch.from_numpy(labels)


@torch.no_grad()
def features(model: Segmenter, ims: torch.Tensor) -> torch.Tensor:
    """Patch tokens before the encoder's last norm, (B, N, d), float16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = model.encoder.embed(ims)
        for block in model.encoder.blocks:
            x = block(x)
    return x[:, 1:].half()


def cache_features(model: Segmenter, pairs: list, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (versions * pictures, N, d) and labels of `args.versions` augmented copies of every training picture."""
    xs, ys = [], []
    for _ in range(args.versions):
        for start in tqdm(range(0, len(pairs), args.batch_size), desc="features", unit="batch"):
            batch = [augment(*pair, args.window, args.max_scale) for pair in pairs[start : start + args.batch_size]]
            ims, labels = zip(*batch, strict=True)
            xs.append(features(model, torch.stack(ims)))
            ys.append(torch.stack(labels))
    return torch.cat(xs), torch.cat(ys)


def standardize_norm(norm: torch.nn.LayerNorm, x: torch.Tensor) -> None:
    """Starts the last norm, which was trained for another block, with outputs of mean 0 and deviation 1 a channel."""
    x = F.layer_norm(x[:: len(x) // 100 + 1].float(), norm.normalized_shape, eps=norm.eps).flatten(0, 1)
    with torch.no_grad():
        norm.weight.copy_(1 / x.std(0))
        norm.bias.copy_(-x.mean(0) / x.std(0))


def train(model: Segmenter, x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW on the decoder and the encoder's last norm; mean cross-entropy of labelled pixels; one pass = all of x."""
    model.train()
    parameters = [*model.decoder.parameters(), *model.encoder.norm.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    steps = args.epochs * (len(x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (0.05 * steps + 1), (1 - i / steps) ** 0.9)
    )
    size = (args.window, args.window)
    for epoch in range(args.epochs):
        total = 0.0
        order = torch.randperm(len(x))[: len(x) // args.batch_size * args.batch_size].split(args.batch_size)
        for index in (bar := tqdm(order, desc=f"pass {epoch + 1}/{args.epochs}", unit="batch")):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                masks = model.decoder(model.encoder.norm(x[index].float()), size)
            logits = F.interpolate(masks.float(), size=y.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, y[index].long(), ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            bar.set_postfix(loss=f"{total / (bar.n + 1):.3f}")
    model.eval()
