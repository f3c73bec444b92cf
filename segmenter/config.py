"""What a model is built from (`ModelConfig`, the 12 published backbones, the paper's names), and what goes with it."""

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from segmenter.errors import InputError

MAX_CLASSES = 65_535
MAX_IMAGE_SIZE = 16_384
MAX_PATCH_SIZE = 256
MIN_NORM_EPS = 1e-30  # of LayerNorm; below, rows of equal values divide zero by zero in float32
MAX_STRETCH = 16  # windows may be so many times as long as the image size; positions stretched further mean nothing
NORMALIZATION = {  # name -> mean and standard deviation of the three channels, in units of pixel / 255
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of ImageNet
    "sat493m": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),  # of the satellite images of DINOv3
}
NORMALIZATIONS = tuple(NORMALIZATION)
POS_EMBED_MODES = ("bilinear", "bicubic", "bicubic_antialias")
POS_EMBED_CHECKS = ("tokens", "grid")
POSITIONS = ("all", "patches", "rotary")  # which tokens have learned positions; none
_NEWER = (  # fields that older versions lack
    "layer_scale", "n_registers", "class_token", "final_norm", "pos_embed", "rope_theta",
)  # fmt: skip
IMPLEMENTATIONS = ("auto", "eager", "triton")


class ConfigError(InputError):
    """A model configuration that cannot be built; the message says which value and what is allowed."""


@dataclass(frozen=True)
class Backbone:
    """One encoder of the published config.yml. `image_size` is what its ImageNet weights were trained at."""

    image_size: int
    patch_size: int
    d_model: int
    n_heads: int
    n_layers: int
    normalization: str
    distilled: bool = False


BACKBONES = {
    "deit_tiny_distilled_patch16_224": Backbone(224, 16, 192, 3, 12, "deit", True),
    "deit_small_distilled_patch16_224": Backbone(224, 16, 384, 6, 12, "deit", True),
    "deit_base_distilled_patch16_224": Backbone(224, 16, 768, 12, 12, "deit", True),
    "deit_base_distilled_patch16_384": Backbone(384, 16, 768, 12, 12, "deit", True),
    "vit_base_patch8_384": Backbone(384, 8, 768, 12, 12, "vit"),
    "vit_tiny_patch16_384": Backbone(384, 16, 192, 3, 12, "vit"),
    "vit_small_patch16_384": Backbone(384, 16, 384, 6, 12, "vit"),
    "vit_base_patch16_384": Backbone(384, 16, 768, 12, 12, "vit"),
    "vit_large_patch16_384": Backbone(384, 16, 1024, 16, 24, "vit"),
    "vit_small_patch32_384": Backbone(384, 32, 384, 6, 12, "vit"),
    "vit_base_patch32_384": Backbone(384, 32, 768, 12, 12, "vit"),
    "vit_large_patch32_384": Backbone(384, 32, 1024, 16, 24, "vit"),
}

DECODERS = {
    "linear": {},
    "mask_transformer": {"drop_path_rate": 0.0, "dropout": 0.1, "n_layers": 2},
}


@dataclass(frozen=True, repr=False)
class ModelConfig:
    """The network part (`net_kwargs`) of a variant.yml, checked.

    The fields up to `drop_path_rate` are those of the published files. The others describe encoders trained elsewhere,
    with the published model as default; see `encoder.VisionTransformer`: `norm_eps` (1e-6 for timm, mmsegmentation and
    DINOv2 weights), `pos_embed_mode` ("bilinear", "bicubic" or "bicubic_antialias"), `pos_embed_check` ("tokens":
    bug-compatible; "grid"), `layer_scale`, `n_registers`, `class_token`, `final_norm` and `pos_embed` ("all" or
    "patches", or "rotary" with the longest period `rope_theta`).
    """

    backbone: str
    image_size: tuple[int, int]
    patch_size: int
    d_model: int
    n_heads: int
    n_layers: int
    n_cls: int
    decoder: dict[str, Any]
    normalization: str = "vit"
    distilled: bool = False
    dropout: float = 0.0
    drop_path_rate: float = 0.1
    norm_eps: float = 1e-5
    pos_embed_mode: str = "bilinear"
    pos_embed_check: str = "tokens"
    layer_scale: bool = False
    n_registers: int = 0
    class_token: bool = True
    final_norm: bool = True
    pos_embed: str = "all"
    rope_theta: float = 100.0

    @classmethod
    def from_dict(cls, net_kwargs: dict[str, Any]) -> "ModelConfig":
        """Reads `net_kwargs` as published: image_size a scalar, list or tuple; unknown keys are ignored.

        Raises:
            ConfigError: a key is missing, has the wrong type, or is out of range.
        """
        if not isinstance(net_kwargs, dict):
            raise ConfigError(f"net_kwargs must be a mapping, found {type(net_kwargs).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        kwargs = {k: v for k, v in net_kwargs.items() if k in fields and v is not None}
        missing = [n for n, f in fields.items() if n not in kwargs and _required(f)]
        if "backbone" in missing:  # only a name
            kwargs["backbone"] = "vit"
            missing.remove("backbone")
        if missing:
            raise ConfigError(f"net_kwargs lacks {', '.join(missing)}")
        return cls(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; `from_dict` reads it back. Fields that only newer encoders have are left out where they are
        as in the published model, so that its files stay what they were."""
        kept = self._named()
        return {name: value for name, value in dataclasses.asdict(self).items() if name in kept} | {
            "image_size": list(self.image_size)
        }

    def __repr__(self) -> str:
        """Of the same fields: fingerprints of models, by which work is resumed, are taken of it."""
        return f"ModelConfig({', '.join(f'{name}={value!r}' for name, value in self._named().items())})"

    def _named(self) -> dict[str, Any]:
        known = {field.name: field.default for field in dataclasses.fields(self) if field.name in _NEWER}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in known or value != known[name]}

    def __post_init__(self) -> None:
        """Brings every value to its type and checks it.

        Raises:
            ConfigError: a value has the wrong type or is out of range.
        """
        for name in ("patch_size", "d_model", "n_heads", "n_layers", "n_cls", "n_registers"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("dropout", "drop_path_rate", "norm_eps", "rope_theta"):
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        object.__setattr__(self, "image_size", _size(self.image_size))
        object.__setattr__(self, "decoder", _decoder(self.decoder))
        for name in ("distilled", "layer_scale", "class_token", "final_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {_shown(getattr(self, name))}")
        self._check_ranges()

    def _check_ranges(self) -> None:
        _in_range("n_cls", self.n_cls, 1, MAX_CLASSES)
        _in_range("patch_size", self.patch_size, 1, MAX_PATCH_SIZE)
        _in_range("n_layers", self.n_layers, 1, 1024)
        _in_range("d_model", self.d_model, 1, 65_536)
        _in_range("n_heads", self.n_heads, 1, self.d_model)
        for side in self.image_size:
            _in_range("image_size", side, 1, MAX_IMAGE_SIZE)
            if side % self.patch_size:
                raise ConfigError(f"image_size {self.image_size} must be divisible by patch_size {self.patch_size}")
        if self.d_model % self.n_heads:
            raise ConfigError(f"d_model {self.d_model} must be divisible by n_heads {self.n_heads}")
        for name in ("dropout", "drop_path_rate"):  # at 1 nothing is left to rescale
            _in_range(name, getattr(self, name), 0.0, 0.999)
            _in_range(f"decoder.{name}", self.decoder.get(name, 0.0), 0.0, 0.999)
        _in_range("norm_eps", self.norm_eps, MIN_NORM_EPS, 1.0)
        _one_of("normalization", self.normalization, NORMALIZATIONS)
        _one_of("pos_embed_mode", self.pos_embed_mode, POS_EMBED_MODES)
        _one_of("pos_embed_check", self.pos_embed_check, POS_EMBED_CHECKS)
        _one_of("pos_embed", self.pos_embed, POSITIONS)
        _in_range("n_registers", self.n_registers, 0, 1024)
        _in_range("rope_theta", self.rope_theta, 1.0, 1e9)
        if self.pos_embed == "rotary" and self.d_model // self.n_heads % 4:
            raise ConfigError(f"rotary positions need heads of a multiple of 4, not {self.d_model // self.n_heads}")
        if self.distilled and not self.class_token:
            raise ConfigError("distilled needs class_token: a distillation token stands beside a class token")
        if self.decoder["name"] == "mask_transformer":
            if self.d_model % 64:
                raise ConfigError(f"the mask transformer has heads of 64: d_model {self.d_model} is no multiple of 64")
            if self.n_cls == 1:
                raise ConfigError("the mask transformer needs n_cls >= 2 (3 or more work well); use the linear decoder")
            _in_range("decoder.n_layers", self.decoder["n_layers"], 0, 1024)


@dataclass
class ModelInfo:
    """What goes with the weights and is no part of the network. Attribute `info` of a model.

    Attributes:
        normalization: key of NORMALIZATION, the statistics of the input.
        window_size, window_stride: sliding windows in pixels.
        classes: key of the class names and palette ("ade20k", "camvid" ...), path of a class file, or None.
        weights: "random", "encoder" (pretrained encoder, random decoder) or "trained".
        source: where the weights came from, for people.
    """

    normalization: str = "vit"
    window_size: int = 512
    window_stride: int = 512
    classes: str | None = None
    weights: str = "random"
    source: str = "random initialisation"


def backbone_config(
    backbone: str,
    decoder: str = "mask_transformer",
    n_cls: int = 150,
    image_size: int | tuple[int, int] = 512,
    **overrides: Any,
) -> ModelConfig:
    """A configuration from one of the 12 published backbones and a decoder name.

    Args:
        backbone: a key of BACKBONES. decoder: "linear" or "mask_transformer". n_cls: classes.
        image_size: pixels the position embedding is made for (the crop size in training).
        overrides: any other ModelConfig field, and `n_decoder_layers`.
    Raises:
        ConfigError: unknown names or values that cannot be built.
    """
    _one_of("backbone", backbone, tuple(BACKBONES))
    _one_of("decoder", decoder, tuple(DECODERS))
    decoder_kwargs = {"name": decoder, **DECODERS[decoder]}
    if "n_decoder_layers" in overrides:
        decoder_kwargs["n_layers"] = overrides.pop("n_decoder_layers")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for name in overrides:
        _one_of("argument", name, tuple(sorted(known - {"backbone", "decoder", "n_cls", "image_size"})))
    named = {"backbone": backbone, "decoder": decoder_kwargs, "n_cls": n_cls, "image_size": image_size}
    return ModelConfig.from_dict({**dataclasses.asdict(BACKBONES[backbone]), **named, **overrides})


_SIZES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
_PRESET_NAME = re.compile(r"Seg-(T|S|B|L|B†|B\+)(-Mask)?/(8|16|32)$")


def preset_names() -> list[str]:
    """The models of the paper and its poster that have a published backbone, by the paper's names."""
    encoders = ["T/16", "S/32", "S/16", "B/32", "B/16", "B/8", "B†/16", "L/32", "L/16"]
    return [f"Seg-{e.replace('/', mask + '/')}" for e in encoders for mask in ("", "-Mask")]


def preset(
    name: str, n_cls: int = 150, image_size: int | tuple[int, int] | None = None, **overrides: Any
) -> ModelConfig:
    """A configuration by the paper's name: "Seg-B-Mask/16", "Seg-B/8", "Seg-B†/16" (or "Seg-B+/16", DeiT) ...

    Any of T, S, B, L goes with any of the patch sizes 8, 16 and 32. Without "-Mask" the decoder is linear.
    The default image size is the paper's for ADE20K: 640 for L, 512 otherwise.
    """
    match = _PRESET_NAME.match(name)
    if not match or (match[1] in ("B†", "B+") and match[3] != "16"):
        raise ConfigError(f"{name!r} is no preset; try one of {', '.join(preset_names())}")
    size, mask, patch = match.groups()
    decoder = "mask_transformer" if mask else "linear"
    if image_size is None:
        image_size = 640 if size == "L" else 512
    if "decoder" in overrides:
        raise ConfigError(f"the name {name!r} says the decoder; n_decoder_layers sets its depth")
    if size in ("B†", "B+"):
        return backbone_config("deit_base_distilled_patch16_384", decoder, n_cls, image_size, **overrides)
    backbone = f"vit_{_SIZES[size]}_patch{patch}_384"
    if backbone in BACKBONES:
        return backbone_config(backbone, decoder, n_cls, image_size, **overrides)
    base = f"vit_{_SIZES[size]}_patch16_384"  # same widths at a patch size that has no published backbone
    return dataclasses.replace(
        backbone_config(base, decoder, n_cls, image_size, patch_size=int(patch), **overrides), backbone=backbone
    )


def check_windows(size: Any, stride: Any, image_size: tuple[int, int]) -> None:
    """Checks sliding windows, in pixels, for a model whose positions are made for `image_size`.

    An image that is smaller than a window is enlarged to it, and attention costs the square of its area.

    Raises:
        ConfigError: no integers, a window beyond MAX_STRETCH times the longer side, a stride beyond the window.
    """
    limit = min(MAX_STRETCH * max(image_size), MAX_IMAGE_SIZE)
    for name, value in (("window_size", size), ("window_stride", stride)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a number of pixels from 1, found {_shown(value)}")
        if value > limit:
            raise ConfigError(
                f"{name} {_shown(value)} is beyond {limit}, too large for a model of images of {image_size}"
            )
    if stride > size:
        raise ConfigError(f"window_stride {stride} beyond window_size {size} would leave pixels out")


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _integer(name: str, value: Any) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value % 1 == 0)
    if isinstance(value, bool) or not whole:
        raise ConfigError(f"{name} must be an integer, found {_shown(value)}")
    return int(value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, str):  # YAML reads 1e-5, without a dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, found {_shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name} is too large a number") from error


def _size(value: Any) -> tuple[int, int]:
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(pair) != 2:
        raise ConfigError(f"image_size must be one number or (height, width), found {_shown(value)}")
    return (_integer("image_size", pair[0]), _integer("image_size", pair[1]))


def _decoder(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"net_kwargs.decoder must be a mapping with a name, found {_shown(value)}")
    if "linear" in value["name"]:
        if not isinstance(value.get("batch_norm", False), bool):
            raise ConfigError(f"decoder.batch_norm must be true or false, found {_shown(value['batch_norm'])}")
        return {"name": "linear", **({"batch_norm": True} if value.get("batch_norm") else {})}
    if value["name"] != "mask_transformer":
        raise ConfigError(f"decoder {_shown(value['name'])} is unknown; choose one of {', '.join(DECODERS)}")
    merged = {k: value.get(k, default) for k, default in DECODERS["mask_transformer"].items()}
    return {
        "name": "mask_transformer",
        "n_layers": _integer("decoder.n_layers", merged["n_layers"]),
        "drop_path_rate": _real("decoder.drop_path_rate", merged["drop_path_rate"]),
        "dropout": _real("decoder.dropout", merged["dropout"]),
    }


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} {_shown(value)} is out of range {low}..{high}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} {_shown(value)} is unknown; choose one of {', '.join(allowed)}")


def _shown(value: Any) -> str:
    """`value` for a message, however large it is."""
    if isinstance(value, int) and not -(10**18) < value < 10**18:
        return "of more than 18 digits"
    try:
        return f"{value!r:.100}"
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__}"
