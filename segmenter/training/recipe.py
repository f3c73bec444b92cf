"""How a model is trained: `Recipe`, every setting of a run, with the published ones as defaults.

Source of the defaults: the paper, section 4.1, and the published code (segm/train.py, segm/config.yml).
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segmenter.config import IMPLEMENTATIONS, NORMALIZATIONS, POS_EMBED_CHECKS, POS_EMBED_MODES
from segmenter.errors import InputError
from segmenter.text_files import read_yaml
from segmenter.training.loss_terms import CROSS_ENTROPY, LossError, LossTerm, parse_loss

OPTIMIZERS = ("sgd", "adamw")
AMP = ("none", "bfloat16", "float16")
BAD_SAMPLES = ("stop", "skip")
DECODERS = ("mask_transformer", "linear")


class RecipeError(InputError):
    """A setting that cannot be used; the message names it and what is allowed."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. None stands for what the data set's published recipe, or the model, says.

    Attributes:
        data, kind, split, val_split: the data set's folder, its layout (None: recognised), and its parts. val_split
            None: no evaluation.
        model: what to start from: a preset such as "Seg-S-Mask/16" (random weights), "timm/NAME" (downloads its
            pretrained weights), or the path of weights of any kind that `segmenter convert` reads.
        new_decoder: put a random decoder on a model that has one already. decoder, decoder_layers: kind and depth of a
            decoder that is not in the file; None: a mask transformer of 2 blocks, or what a preset's name says.
            decoder_batch_norm: of a linear one, see `segmenter.decoder.DecoderLinear`.
        patch_size: resamples the patch embedding. n_layers: keeps only the first blocks of the encoder.
        dropout, drop_path: of the encoder (drop_path is stochastic depth). decoder_dropout: of the mask transformer.
        freeze_backbone: train the decoder alone.
        im_size, max_ratio, scale, crop_size, cat_max_ratio, flip, photometric: see `segmenter.data.augment`. im_size
            holds for evaluation, too; None, of data sets that have no published one: the images' own size.
        normalization, pos_embed_mode, pos_embed_check: see `segmenter.config.ModelConfig`; None: the model's.
        epochs, batch_size: passes, and samples a step of all processes together. accumulate: into how many parts each
            process cuts its share: they go through the model one after another, which takes less memory.
        optimizer: "sgd" (Nesterov, `momentum`) or "adamw" (betas 0.9 and 0.999). learning_rate: of the decoder.
        backbone_rate: the rate of the encoder's last block over that of the decoder (1: the same, as published).
        layer_decay: the rate of each encoder block over that of the next (1: all the same).
        weight_decay: not of biases, norms, positions and tokens. min_lr, power, warmup_steps: polynomial decay after a
            linear warm-up, per step. clip_grad: largest norm of all gradients together; None: not clipped.
        class_weighting: each class counts as its share of the pixels to the power of minus this (0: all the same).
        loss: a name or a weighted sum such as "cross_entropy + 0.5 dice(smooth=1)": `segmenter.training.loss_terms`.
        lovasz: this times the Lovász-softmax loss is added; the same as "+ X lovasz" in `loss`.
        ema: decay of the average of weights that is evaluated and saved, 0: none.
        amp: "bfloat16" or "float16" autocast. impl: "eager", "triton" or "auto"; eager until the kernels have been
            measured in training. seed: of weights, order and augmentation.
        recompute: what backward passes compute again, 0 to 3: see `segmenter.Segmenter.recompute`. None: 1 by kernels.
        eval_freq: epochs between evaluations. save_minutes: between saves. log_steps: between lines of the log.
        overlays: images of val that are drawn at each evaluation. tensorboard: also log for TensorBoard.
        workers: processes that read samples. bad_samples: "stop", or "skip" and count those that cannot be read.
        window_size, window_stride: of evaluation and of the saved model; None: the data set's, or the crop size.
    """

    data: str
    model: str = "Seg-S-Mask/16"
    kind: str | None = None
    split: str = "train"
    val_split: str | None = "val"
    new_decoder: bool = False
    decoder: str | None = None
    decoder_layers: int | None = None
    decoder_batch_norm: bool = False
    patch_size: int | None = None
    n_layers: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.1
    decoder_dropout: float = 0.1
    freeze_backbone: bool = False
    im_size: int | None = None
    max_ratio: float | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    crop_size: int | None = None
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    normalization: str | None = None
    pos_embed_mode: str | None = None
    pos_embed_check: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    optimizer: str = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    backbone_rate: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    min_lr: float = 1e-5
    power: float = 0.9
    warmup_steps: int = 0
    clip_grad: float | None = None
    class_weighting: float = 0.0
    loss: str = CROSS_ENTROPY
    lovasz: float = 0.0
    ema: float = 0.0
    amp: str = "none"
    impl: str = "eager"
    recompute: int | None = None
    seed: int = 0
    eval_freq: int | None = None
    save_minutes: float = 10.0
    log_steps: int = 20
    overlays: int = 4
    tensorboard: bool = False
    workers: int = 4
    bad_samples: str = "stop"
    window_size: int | None = None
    window_stride: int | None = None

    def __post_init__(self) -> None:
        """Brings values to their types and checks them.

        Raises:
            RecipeError: a value has the wrong type or makes no sense.
        """
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise RecipeError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RecipeError(f"{name} must lie in {low}..{high}, found {value}")
        if not 0 < self.scale[0] <= self.scale[1] <= 16:
            raise RecipeError(f"scale must be two rising numbers up to 16, found {list(self.scale)}")
        self.loss_terms()
        if self.impl == "eager" and self.recompute in (0, 1, 2):
            raise RecipeError(f'recompute {self.recompute} needs kernels: impl "triton" or "auto"; 3 works without')

    def loss_terms(self) -> tuple[LossTerm, ...]:
        """What `loss` and `lovasz` add up.

        Raises:
            RecipeError: `loss` cannot be read, or both name Lovász-softmax.
        """
        try:
            terms = parse_loss(self.loss)
        except LossError as error:
            raise RecipeError(str(error)) from error
        if not self.lovasz:
            return terms
        if any(term.name == "lovasz" for term in terms):
            raise RecipeError(f"loss {self.loss!r} has lovasz, and so has the setting lovasz {self.lovasz}; say one")
        return (*terms, LossTerm("lovasz", self.lovasz))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; `Recipe(**that)` is the same again."""
        return {**dataclasses.asdict(self), "scale": list(self.scale)}

    def completed(self, key: str) -> "Recipe":
        """With the published settings of the data set `key` where nothing was said, or the usual ones.

        Raises:
            RecipeError: a setting that has no usual value is missing.
        """
        from segmenter.data.datasets import PUBLISHED

        usual = {"max_ratio": 4.0, "eval_freq": 1}
        if key in PUBLISHED:
            usual = dataclasses.asdict(PUBLISHED[key])
        found = {name: usual.get(name) for name in _PUBLISHED if getattr(self, name) is None}
        filled = dataclasses.replace(self, **{name: value for name, value in found.items() if value is not None})
        # windows of another size than the crop would meet positions that were never trained
        crop = filled.crop_size
        size = filled.window_size or (usual.get("window_size") if crop == usual.get("crop_size") else crop)
        stride = filled.window_stride or (usual.get("window_stride") if size == usual.get("window_size") else size)
        filled = dataclasses.replace(filled, window_size=size, window_stride=stride)
        missing = [name for name in _PUBLISHED if name != "im_size" and getattr(filled, name) is None]
        if missing:
            raise RecipeError(f"the data set {key!r} has no published {', '.join(missing)}: say them in the recipe")
        if filled.window_stride > filled.window_size:
            raise RecipeError(f"window_stride {stride} beyond window_size {size} would leave pixels out")
        return filled


_PUBLISHED = ("im_size", "max_ratio", "crop_size", "epochs", "batch_size", "learning_rate", "eval_freq")
_ALLOWED = {
    "decoder": DECODERS,
    "optimizer": OPTIMIZERS,
    "amp": AMP,
    "impl": IMPLEMENTATIONS,
    "bad_samples": BAD_SAMPLES,
    "normalization": NORMALIZATIONS,
    "pos_embed_mode": POS_EMBED_MODES,
    "pos_embed_check": POS_EMBED_CHECKS,
}
_INFINITY = math.inf
_RANGES = {
    **dict.fromkeys(("dropout", "drop_path", "decoder_dropout", "momentum", "ema"), (0.0, 0.99999)),
    **dict.fromkeys(("flip", "cat_max_ratio", "layer_decay", "backbone_rate"), (0.0, 1.0)),
    **dict.fromkeys(("epochs", "batch_size", "im_size", "crop_size", "patch_size", "eval_freq"), (1, 1_000_000)),
    **dict.fromkeys(("accumulate", "n_layers", "log_steps", "window_size", "window_stride"), (1, 1_000_000)),
    **dict.fromkeys(("decoder_layers", "warmup_steps", "seed", "overlays", "workers"), (0, 2**31)),
    **dict.fromkeys(("weight_decay", "power", "class_weighting", "lovasz", "save_minutes", "min_lr"), (0, _INFINITY)),
    **dict.fromkeys(("learning_rate", "clip_grad"), (1e-12, _INFINITY)),
    "max_ratio": (1.0, _INFINITY),
    "recompute": (0, 3),
}


def read_recipe(path: str | Path, **changes: Any) -> Recipe:
    """A recipe from a YAML file, with `changes` put over it; a relative `data` is relative to the current folder.

    Raises:
        RecipeError: no such file, no YAML mapping, an unknown setting or a wrong value; the message names the file.
    """
    settings = read_yaml(path, RecipeError)
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: expected a mapping of settings")
    try:
        return make_recipe({**settings, **changes})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """A recipe from settings by name.

    Raises:
        RecipeError: an unknown name, no `data`, or a wrong value.
    """
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := [str(name) for name in settings if name not in known]:
        raise RecipeError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if "data" not in settings:
        raise RecipeError("data is missing: the folder of the data set")
    return Recipe(**settings)


def flag_kinds() -> dict[str, type]:
    """int, float, str or bool for each setting (of `scale`: that of its two numbers)."""
    return {field.name: _kind(field) for field in dataclasses.fields(Recipe)}


def _kind(field: dataclasses.Field) -> type:
    if field.name == "scale":
        return float
    return next(kind for kind in getattr(field.type, "__args__", (field.type,)) if kind is not type(None))


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """The value as the type that the field's annotation names."""
    name, kind = field.name, _kind(field)
    if value is None and field.default is None:
        return None
    if name == "scale":
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(v) for v in value):
            raise RecipeError(f"scale must be two numbers, found {value!r}")
        return (float(value[0]), float(value[1]))
    if name == "val_split" and value in (None, "none"):
        return None
    if kind is float and isinstance(value, str):  # YAML reads 1e-5, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            raise RecipeError(f"{name} must be a number, found {value!r}") from None
    if isinstance(value, Path):
        value = str(value)
    fits = _is_number(value) if kind is float else type(value) is kind
    if not fits:
        raise RecipeError(f"{name} must be {_WORDS[kind]}, found {value!r}")
    return kind(value)


_WORDS = {float: "a number", int: "an integer", bool: "true or false", str: "text"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
