"""The models that ours are compared with: their published figures, and how to build each with random weights.

`PEERS` is bench/peers.yml with a function beside every row that can be built. `peer.build(n_cls, image_size)` gives a
network in evaluation mode that takes normalised images (B, 3, image_size, image_size) and returns class scores
(B, n_cls, h, w) at its own resolution; resizing them to the image and the argmax are the same for every model and not
part of it. Rows of ours (`peer.ours`) give a Segmenter, which has its own ways to labels (bench/models.py).

Nothing is downloaded. timm, transformers and segmentation-models-pytorch are imported when a model is built; a missing
one is an ImportError that says what to install.

A row has the network whose mIoU it shows, not a cheaper one of the same name. Auxiliary heads, which only training
uses, are left out, and so is work that inference with the published weights does not do (see `eomt`).
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from torch.optim.swa_utils import update_bn

from segmenter.config import preset
from segmenter.model import create_segmenter

Build = Callable[[int, int], nn.Module]


class Figure(NamedTuple):
    """A published number. `source` is a key of SOURCES; `gpu` and `how` belong to speeds."""

    value: float
    source: str
    gpu: str = ""
    how: str = ""


class Peer(NamedTuple):
    """One row of the comparison: bench/peers.yml says what its fields mean. `build` is None where there is no model."""

    name: str
    backbone: str
    build: Build | None
    size: int
    ours: bool
    group: str
    crop: int
    miou_ss: Figure | None
    miou_ms: Figure | None
    images_per_second: Figure | None
    parameters: Figure | None
    multiply_adds: Figure | None = None
    training_only: float = 0.0
    note: str = ""

    @property
    def id(self) -> str:
        """Name and backbone, as one string."""
        return f"{self.name} {self.backbone}"


# ---------------------------------------------------------------------------------------------------------------------
# Heads that no library has


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(in_channels: int, channels: int, kernel_size: int = 1, **kwargs: int) -> nn.Sequential:
    """Convolution that keeps the resolution, BatchNorm, ReLU."""
    convolution = nn.Conv2d(in_channels, channels, kernel_size, padding="same", bias=False, **kwargs)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def separable(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution as one over pixels and one over channels, BatchNorm and ReLU after both."""
    return conv(in_channels, in_channels, 3, dilation=dilation, groups=in_channels) + conv(in_channels, channels)


class DeepLabHead(nn.Module):
    """Head of DeepLabv3+ (Chen et al., ECCV 2018) in the sizes of mmsegmentation's `deeplabv3plus_r50-d8`.

    Takes [low (B, low_channels, h, w), high (B, in_channels, h', w')], returns scores (B, n_cls, h, w).
    """

    def __init__(self, low_channels: int, in_channels: int, n_cls: int, channels: int = 512, low_out: int = 48):
        super().__init__()
        self.pooled = conv(in_channels, channels)
        self.point = conv(in_channels, channels)
        self.atrous = nn.ModuleList(separable(in_channels, channels, rate) for rate in (12, 24, 36))
        self.bottleneck = conv(5 * channels, channels, 3)
        self.low = conv(low_channels, low_out)
        self.fuse = separable(channels + low_out, channels) + separable(channels, channels)
        self.cls = nn.Conv2d(channels, n_cls, 1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        low, high = features
        pooled = self.pooled(high.mean((2, 3), keepdim=True)).expand(-1, -1, *high.shape[-2:])
        x = self.bottleneck(torch.cat([pooled, self.point(high), *(rate(high) for rate in self.atrous)], 1))
        return self.cls(self.fuse(torch.cat([resize(x, low.shape[-2:]), self.low(low)], 1)))


def object_regions(pixels: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mean feature of each class, weighted by where it scores high: (B, C, h, w), (B, K, h, w) -> (B, C, K, 1)."""
    weights = scores.flatten(2).softmax(-1)  # (B, K, N): over the image, not over the classes
    return (pixels.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)


class OCRHead(nn.Module):
    """Object-contextual representations (Yuan et al., ECCV 2020, section 3.3), sizes of mmsegmentation's `ocrnet_hr48`.

    Every pixel attends to the mean features of the classes, which a first classifier finds. Takes branches
    (B, c_i, h_i, w_i) whose c_i add up to `in_channels`, the finest first; returns scores (B, n_cls, h_0, w_0).
    """

    def __init__(self, in_channels: int, n_cls: int, channels: int = 512, key_channels: int = 256):
        super().__init__()
        self.regions = nn.Sequential(conv(in_channels, in_channels), nn.Conv2d(in_channels, n_cls, 1))
        self.pixels = conv(in_channels, channels, 3)
        self.query = conv(channels, key_channels) + conv(key_channels, key_channels)
        self.key = conv(channels, key_channels) + conv(key_channels, key_channels)
        self.value = conv(channels, key_channels)
        self.up = conv(key_channels, channels)
        self.fuse = conv(2 * channels, channels)
        self.cls = nn.Conv2d(channels, n_cls, 1)

    def context(self, pixels: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """What each pixel gathers from the classes: (B, C, h, w), (B, C, K, 1) -> (B, C, h, w)."""
        maps = self.query(pixels), self.key(objects), self.value(objects)
        q, k, v = (m.flatten(2).transpose(1, 2).unsqueeze(1) for m in maps)  # (B, 1, N or K, key_channels)
        context = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return self.up(context.reshape(maps[0].shape))

    def forward(self, branches: Sequence[torch.Tensor]) -> torch.Tensor:
        x = torch.cat([branches[0], *(resize(b, branches[0].shape[-2:]) for b in branches[1:])], 1)
        pixels = self.pixels(x)
        context = self.context(pixels, object_regions(pixels, self.regions(x)))
        return self.cls(self.fuse(torch.cat([context, pixels], 1)))


class MLAHead(nn.Module):
    """Multi-level aggregation of SETR (Zheng et al., CVPR 2021), sizes of the authors' `setr_mla` configuration.

    Takes the tokens of four layers (B, d_model, h, w), the deepest last; each is added to what the deeper ones gave.
    Returns scores (B, n_cls, 4 h, 4 w).
    """

    def __init__(self, d_model: int, n_cls: int, channels: int = 256, head_channels: int = 128):
        super().__init__()

        def four(layer: Callable[[], nn.Module]) -> nn.ModuleList:
            return nn.ModuleList(layer() for _ in range(4))

        self.norms = four(lambda: nn.LayerNorm(d_model, eps=1e-6))
        self.lateral = four(lambda: conv(d_model, channels))
        self.smooth = four(lambda: conv(channels, channels, 3))
        self.heads = four(lambda: conv(channels, head_channels, 3) + conv(head_channels, head_channels, 3))
        self.cls = nn.Conv2d(4 * head_channels, n_cls, 3, padding=1)

    def forward(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        size = [4 * side for side in layers[0].shape[-2:]]
        total, streams = 0, []
        for i in reversed(range(4)):
            normed = self.norms[i](layers[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            total = total + self.lateral[i](normed)
            streams.append(resize(self.heads[i](self.smooth[i](total)), size))
        return self.cls(torch.cat(streams, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Models of libraries


class Scores(nn.Module):
    """A library's model with the function that takes (B, n_cls, h, w) scores out of it."""

    def __init__(self, model: nn.Module, scores: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, im: torch.Tensor) -> torch.Tensor:
        return self.scores(self.model, im)


def semantic_scores(class_logits: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
    """Class probabilities of the queries, without "no object", times their masks: sums over queries.

    (B, Q, n_cls + 1), (B, Q, h, w) -> (B, n_cls, h, w), as transformers' `post_process_semantic_segmentation`, but at
    the masks' own resolution.
    """
    return torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())


def _head_logits(model: nn.Module, im: torch.Tensor) -> torch.Tensor:
    # Not the model's forward, which resizes all scores to the image.
    return model.decode_head(model.backbone(im).feature_maps)


def _query_scores(model: nn.Module, im: torch.Tensor) -> torch.Tensor:
    found = model(im)
    return semantic_scores(found.class_queries_logits, found.masks_queries_logits)


def library(package: str, *names: str) -> list[Any]:
    """What a package has under these names.

    Raises:
        ImportError: it is not installed, or too old to have one of them; the message says what to install.
    """
    try:
        module = importlib.import_module(package.replace("-", "_"))
        return [getattr(module, name) for name in names]
    except (AttributeError, ImportError) as error:
        wanted = f"{package} with {' and '.join(names)}"
        raise ImportError(f"this model needs {wanted}: pip install -U {package} ({error})") from error


def settled(network: nn.Module) -> nn.Module:
    """The network with BatchNorm statistics of noise, so that random convolutions do not let values grow.

    Without that OCR's scores are about 1e7, and float16 ends at 65504.
    """
    if not next(network.parameters()).is_meta:
        noise = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        update_bn([noise], network)
    return network


def _timm(name: str, **kwargs: Any) -> nn.Module:
    (create_model,) = library("timm", "create_model")
    return create_model(name, pretrained=False, **kwargs)


def _transformers(config_name: str, network_name: str, **kwargs: Any) -> nn.Module:
    config, network = library("transformers", config_name, network_name)
    return network(config(**kwargs))


# ---------------------------------------------------------------------------------------------------------------------
# Builders: (n_cls, image_size) -> network


def _deeplabv3plus(trunk: str, n_cls: int, image_size: int) -> nn.Module:
    """As mmsegmentation publishes it: the last two stages dilated, so that features stay at an eighth of the image.

    Its ResNet is "v1c", with three 3x3 convolutions in the stem, and its ResNeSt has 128 stem channels.
    """
    features = _timm(trunk, features_only=True, output_stride=8, out_indices=(1, 4))
    return settled(nn.Sequential(features, DeepLabHead(*features.feature_info.channels(), n_cls)))


def _deeplabv3plus_os16(trunk: str, n_cls: int, image_size: int) -> nn.Module:
    """The defaults of segmentation-models-pytorch, without its upsampling."""
    (network,) = library("segmentation-models-pytorch", "DeepLabV3Plus")
    return settled(network(trunk, encoder_weights=None, classes=n_cls, upsampling=1))


def _ocr_hrnet(n_cls: int, image_size: int) -> nn.Module:
    """The four branches of HRNetV2-W48, not the widened ones of its classification head, with OCR on them."""
    branches = _timm("hrnet_w48", features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    return settled(nn.Sequential(branches, OCRHead(sum(branches.feature_info.channels()), n_cls)))


def _vit_layers(name: str, indices: tuple[int, ...], **sizes: int) -> nn.Module:
    """Images to the tokens of these layers, without class token and last norm: the head has a norm for each."""
    return _timm(name, features_only=True, out_indices=indices, class_token=False, global_pool="", **sizes)


def _setr_mla(n_cls: int, image_size: int) -> nn.Module:
    """ViT-L/16 without class token, as in the authors' code; layers 6, 12, 18 and 24 go to the head."""
    layers = _vit_layers("vit_large_patch16_384", (5, 11, 17, 23), img_size=image_size)
    return nn.Sequential(layers, MLAHead(layers.feature_info.channels()[0], n_cls))


def _swin_large() -> Any:
    """Configuration of Swin-L with windows of 12, as pretrained at 384 pixels on ImageNet-22k."""
    (config,) = library("transformers", "SwinConfig")
    sizes = {"image_size": 384, "embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]}
    return config(**sizes, window_size=12, out_features=["stage1", "stage2", "stage3", "stage4"])


def _upernet_swin(n_cls: int, image_size: int) -> nn.Module:
    kwargs = {"backbone_config": _swin_large(), "num_labels": n_cls, "use_auxiliary_head": False}
    return Scores(_transformers("UperNetConfig", "UperNetForSemanticSegmentation", **kwargs), _head_logits)


def _segformer_b5(n_cls: int, image_size: int) -> nn.Module:
    """MiT-B5 (table 6 of the paper) with the decoder of width 768."""
    kwargs = {"depths": [3, 6, 40, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
    network = _transformers("SegformerConfig", "SegformerForSemanticSegmentation", num_labels=n_cls, **kwargs)
    return Scores(network, lambda model, im: model(im).logits)


def _mask2former_swin(n_cls: int, image_size: int) -> nn.Module:
    """100 queries and transformers' defaults, which are the authors': 6 encoder and 9 decoder layers of width 256."""
    kwargs = {"backbone_config": _swin_large(), "num_labels": n_cls, "num_queries": 100}
    network = _transformers("Mask2FormerConfig", "Mask2FormerForUniversalSegmentation", **kwargs)
    return Scores(network, _query_scores)


def eomt(prefix: str, n_cls: int, image_size: int, **smaller: int) -> nn.Module:
    """EoMT of transformers: ViT-L/16 with 100 queries in its last four layers, as published for ADE20K.

    A new model has masked attention on: it predicts masks before each of those layers, a fifth of the multiply-adds.
    Training anneals that away, published weights hold zeros there, and the authors' code skips it in inference. A
    plain tuple instead of the buffer also spares one transfer from the device for each layer.

    Args:
        prefix: of its classes, "Eomt" or "EomtDinov3". smaller: sizes of its configuration, for smoke tests.
    """
    kwargs = {"num_labels": n_cls, "image_size": image_size, "num_queries": 100, **smaller}
    model = _transformers(f"{prefix}Config", f"{prefix}ForUniversalSegmentation", **kwargs)
    del model.attn_mask_probs
    model.attn_mask_probs = (0.0,) * model.config.num_blocks
    return model


def _eomt(prefix: str, n_cls: int, image_size: int) -> nn.Module:
    return Scores(eomt(prefix, n_cls, image_size), _query_scores)


OURS = "segmenter"
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3plus_resnet101": functools.partial(_deeplabv3plus, "resnet101c"),
    "deeplabv3plus_resnest101": functools.partial(_deeplabv3plus, "resnest101e"),
    "deeplabv3plus_os16_resnet101": functools.partial(_deeplabv3plus_os16, "resnet101"),
    "deeplabv3plus_os16_resnest101": functools.partial(_deeplabv3plus_os16, "tu-resnest101e"),
    "ocr_hrnet": _ocr_hrnet,
    "setr_mla": _setr_mla,
    "upernet_swin": _upernet_swin,
    "segformer_b5": _segformer_b5,
    "mask2former_swin": _mask2former_swin,
    "eomt_dinov2": functools.partial(_eomt, "Eomt"),
    "eomt_dinov3": functools.partial(_eomt, "EomtDinov3"),
    OURS: lambda name, n_cls, size: create_segmenter(preset(name, n_cls=n_cls, image_size=size), impl="eager"),
}


def _peer(row: dict[str, Any]) -> Peer:
    """A row of peers.yml. Misspelt keys and values without a source are errors."""
    row = {"build": None, "crop": row["size"], "multiply_adds": None, **row}
    for key in ("miou_ss", "miou_ms", "images_per_second", "parameters", "multiply_adds"):
        row[key] = row[key] and Figure(**row[key])
    key = row["build"]
    if key is not None:
        build = functools.partial(BUILDERS[key], row["name"]) if key == OURS else BUILDERS[key]
        row["build"] = lambda n_cls, image_size: build(n_cls, image_size).eval()
    return Peer(ours=key == OURS, **row)


_DATA = yaml.safe_load(Path(__file__).with_name("peers.yml").read_text(encoding="utf-8"))
SOURCES: dict[str, dict[str, str]] = _DATA["sources"]  # where figures were published, and what of that was seen
PEERS: tuple[Peer, ...] = tuple(_peer(row) for row in _DATA["rows"])
