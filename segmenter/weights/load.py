"""Models from files: `load_model` as in the published code, `load_any` for everything else, and conversion.

Nothing here opens a network connection, except `from_pretrained` and `load_any` with hub=True.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from segmenter.config import NORMALIZATIONS, ConfigError, ModelConfig, check_windows, preset
from segmenter.errors import InputError, cause, printable
from segmenter.model import ModelInfo, Segmenter, create_segmenter
from segmenter.ops import ImplementationError
from segmenter.text_files import read_json
from segmenter.weights.build import build, build_on_encoder, load_state
from segmenter.weights.convert import Converted, convert, recognise
from segmenter.weights.names import hugging_face_fields, normalization_of, timm_fields
from segmenter.weights.pretrained import WEIGHTS, from_pretrained, is_ours, save_pretrained
from segmenter.weights.read import CheckpointError, listing, read_weights
from segmenter.weights.variant_yml import read_variant

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "convert_checkpoint",
    "from_pretrained",
    "load_any",
    "load_model",
    "load_state",
    "save_pretrained",
]

_WEIGHT_FILES = ("checkpoint.pth", WEIGHTS, "pytorch_model.bin")
_CLASSES = {  # (data set, number of classes) -> key of the class set
    ("ade20k", 150): "ade20k",
    ("pascal_context", 60): "pascal_context",
    ("pascal_context", 59): "pascal_context_59",
    ("cityscapes", 19): "cityscapes",
    ("camvid", 11): "camvid",
}
_FIRST_CLASS = {"wall": "ade20k", "background": "pascal_context", "aeroplane": "pascal_context", "road": "cityscapes"}


@dataclasses.dataclass
class ConversionReport:
    """What `convert_checkpoint` did; str() of it is for people, and printable."""

    source: str
    folder: str
    kind: str
    weights: str
    n_parameters: int
    config: ModelConfig
    notes: list[str]

    def __str__(self) -> str:
        c = self.config
        model = (
            f"{c.n_layers} layers of width {c.d_model}, patch {c.patch_size}, image size {c.image_size}, "
            f"{c.decoder['name']} decoder, {c.n_cls} classes, {self.n_parameters:,} parameters"
        )
        lines = [f"{self.source} ({self.kind}) -> {self.folder}", f"  {model}", *(f"  {note}" for note in self.notes)]
        if self.weights == "encoder":
            lines.append("  the file has no decoder: the decoder's weights are RANDOM, train before use")
        return printable("\n".join(lines))


def load_model(
    model_path: str | os.PathLike,
    impl: str = "auto",
    device: str | torch.device | None = None,
    *,
    averaged: bool | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> tuple[Segmenter, dict[str, Any]]:
    """Loads a segmentation model, strictly and offline; it is in evaluation mode.

    Args:
        model_path: checkpoint.pth with variant.yml beside it, or the folder of both; a folder of `save_pretrained`; or
            a whole model of another project (mmsegmentation), whose configuration is read off the weights. That is
            also done, with a warning, for a checkpoint.pth that has lost its variant.yml.
        impl: "eager", "triton" or "auto". device: where the model goes, by default the CPU.
        averaged: which weights of a training checkpoint that holds two sets, plain and averaged (EMA); None takes those
            that `read_weights` takes, with a warning.
        allow_pickle: "I trust this file", see `read_state_dict`. verify: compares checksums where there are any.
        allow_nonfinite: accepts NaN weights.
    Returns:
        (model, variant): variant is the whole variant.yml, or the same made up where there is none.
    Raises:
        CheckpointError: the file or what is beside it is unusable, or has no decoder. ConfigError, in variant.yml.
    """
    options = {"allow_pickle": allow_pickle, "verify": verify, "allow_nonfinite": allow_nonfinite, "averaged": averaged}
    model, variant, _, _ = _from_path(Path(model_path), impl, options, {})
    return (model.to(device) if device is not None else model), variant


def load_any(
    source: str | os.PathLike | nn.Module,
    *,
    impl: str = "auto",
    device: str | torch.device | None = None,
    classes: str | None = None,
    hub: bool = False,
    averaged: bool | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
    **request: Any,
) -> Segmenter:
    """A Segmenter, in evaluation mode, from whatever `source` is. See `model.info.weights` for what is trained in it.

    Args:
        source: anything `load_model` takes; a file with an encoder only (timm, augreg .npz, Hugging Face,
            mmsegmentation), which gets a random decoder; a folder of Hugging Face; a live model of timm or
            transformers; or the name of a preset such as "Seg-S-Mask/16", for random weights.
        classes: key of a class set or a class file, for `model.info.classes`.
        hub: a `source` that is nothing else is taken for a repository on the Hugging Face hub.
        request: n_cls, decoder, image_size, patch_size, kind, normalization ... of `segmenter.weights.convert.convert`.
            For encoders, n_cls is needed. For presets: n_cls, image_size and fields of ModelConfig.
        others: as in `load_model`.
    Raises:
        CheckpointError, ConfigError: source is nothing of the kind, damaged, or does not agree with the request.
    """
    options = {"allow_pickle": allow_pickle, "verify": verify, "allow_nonfinite": allow_nonfinite, "averaged": averaged}
    model, _, _ = _load(source, impl, hub, options, request)
    if classes is not None:
        model.info.classes = classes
    return model.to(device) if device is not None else model


def convert_checkpoint(
    source: str | os.PathLike | nn.Module,
    out_folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    classes: str | None = None,
    hub: bool = False,
    averaged: bool | None = None,
    allow_pickle: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
    **request: Any,
) -> ConversionReport:
    """Reads `source` as `load_any` does and writes a folder of our format.

    Args:
        dtype: how the weights are stored, see `save_pretrained`. Others: as in `load_any`.
    Raises:
        CheckpointError, ConfigError: as `load_any`. OSError: the folder cannot be written.
    """
    options = {"allow_pickle": allow_pickle, "verify": verify, "allow_nonfinite": allow_nonfinite, "averaged": averaged}
    model, kind, notes = _load(source, "eager", hub, options, request)
    save_pretrained(model, out_folder, dtype=dtype, classes=classes)
    name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    n_parameters = sum(p.numel() for p in model.parameters())
    return ConversionReport(name, str(out_folder), kind, model.info.weights, n_parameters, model.config, notes)


def _load(
    source: str | os.PathLike | nn.Module, impl: str, hub: bool, options: dict[str, Any], request: dict[str, Any]
) -> tuple[Segmenter, str, list[str]]:
    """(model, kind, notes)"""
    request = {name: value for name, value in request.items() if value is not None}
    if isinstance(source, nn.Module):
        _only_one_set(f"a live {type(source).__name__}", options)
        converted = convert(source, **request)
        if converted.difference is not None:
            converted.notes.append(f"its tokens are those of the live model, to {converted.difference:.0e} (exact)")
        return _assemble(converted, impl, f"live {type(source).__name__}"), converted.kind, converted.notes
    if os.path.exists(Path(source)):
        model, _, kind, notes = _from_path(Path(source), impl, options, request)
        return model, kind, notes
    _only_one_set(str(source), options)
    if hub:
        model = from_pretrained(source, impl=impl, hub=True, verify=options["verify"])
        return _reshaped(model, impl, request, notes := []), "segmenter", notes
    if fixed := [name for name in ("kind", "decoder", "patch_size") if name in request]:
        raise ConfigError(f"{source}: no such file or folder, and a preset takes no {listing(fixed)}; its name says it")
    try:
        config = preset(str(source), **request)
    except ConfigError as error:
        if str(source).startswith("Seg-"):
            raise
        raise CheckpointError(
            f"{source}: no such file or folder, and no preset such as Seg-S-Mask/16; "
            f"hub=True would look for it on the Hugging Face hub"
        ) from error
    return create_segmenter(config, impl).eval(), "preset", ["random weights"]


def _from_path(
    path: Path, impl: str, options: dict[str, Any], request: dict[str, Any]
) -> tuple[Segmenter, dict[str, Any], str, list[str]]:
    """(model, variant, kind, notes) of a file or folder."""
    notes: list[str] = []
    folder = path if os.path.isdir(path) else path.parent
    if (os.path.isdir(path) or path.name == WEIGHTS) and is_ours(folder):
        _only_one_set(str(folder), options)
        kept = {name: options[name] for name in ("verify", "allow_nonfinite")}
        model = _reshaped(from_pretrained(folder, impl=impl, **kept), impl, request, notes)
        return model, variant_of(model), "segmenter", notes
    if os.path.isdir(path):
        path = next((folder / name for name in _WEIGHT_FILES if os.path.isfile(folder / name)), None)
        if path is None:
            if shards := next(folder.glob("*.index.json"), None):
                raise CheckpointError(
                    f"{folder}: its weights are in several files ({shards.name}), which are not read; save them in "
                    "one, in transformers with save_pretrained(..., max_shard_size='100GB')"
                )
            raise CheckpointError(f"{folder}: has none of {', '.join(_WEIGHT_FILES)}; give the weight file itself")
    found = read_weights(path, **options)
    state, notes = found.state, list(found.notes)
    if options["averaged"] is None:
        for note in (note for note in notes if "averaged=" in note):  # it names the way to the other set
            warnings.warn(printable(f"{path}: {note}"), stacklevel=4)
    source = printable("/".join(path.absolute().parts[-2:]))
    kind = request.get("kind") or recognise(state)
    variant_path = folder / "variant.yml"
    has_decoder = any(name.startswith("decoder.") for name in state)
    if kind == "segmenter" and has_decoder and os.path.isfile(variant_path):
        variant = read_variant(variant_path)
        with _refusing(path):
            model = build(_config_of(variant, variant_path), state, impl, str(path))
            model.info = _info_of(variant, model.config, source, variant_path)
            return _reshaped(model, impl, request, notes), variant, kind, notes
    if kind == "segmenter" and has_decoder:
        text = "no variant.yml beside it: sizes are read off the weights; normalization and windows are guessed"
        warnings.warn(printable(f"{path}: {text}"), stacklevel=4)
    request = {**_fields_beside(folder, kind), **request}
    with _refusing(path):
        try:
            converted = convert(state, **request)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        model = _assemble(converted, impl, source)
    if kind == "mmseg":
        model.info.window_stride = max(model.info.window_size - 32, 1)
        model.info.classes = _mmseg_classes(found.extra, model.n_cls)
    return model, variant_of(model), converted.kind, notes + converted.notes


def _only_one_set(source: str, options: dict[str, Any]) -> None:
    if options["averaged"]:
        raise CheckpointError(f"{source}: holds one set of weights, none averaged beside it; leave averaged=True away")


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Weights that no check foresaw end in the documented exception as well."""
    try:
        yield
    except (InputError, ImplementationError):
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: weights of a form that no model here has ({cause(error)})") from error


def _assemble(converted: Converted, impl: str, source: str) -> Segmenter:
    make = build if converted.has_decoder else build_on_encoder
    model = make(converted.config, converted.state, impl, source)
    window = max(converted.config.image_size)
    model.info = ModelInfo(
        normalization=converted.config.normalization,
        window_size=window,
        window_stride=window,
        weights="trained" if converted.has_decoder else "encoder",
        source=f"{source} ({converted.kind})",
    )
    return model


def _reshaped(model: Segmenter, impl: str, request: Mapping[str, Any], notes: list[str]) -> Segmenter:
    """The model itself if `request` asks for nothing, else one of another image or patch size with its weights."""
    request = {name: value for name, value in request.items() if name != "kind"}
    if not request:
        return model
    config = dataclasses.asdict(model.config)
    for derived in ("image_size", "patch_size", "d_model", "n_layers", "n_cls", "distilled"):
        del config[derived]
    grid = model.encoder.patch_embed.grid_size
    converted = convert(model.state_dict(), kind="segmenter", grid=grid, **{**config, **request})
    notes += converted.notes
    reshaped = build(converted.config, converted.state, impl, "the weights")
    reshaped.info = dataclasses.replace(model.info, normalization=converted.config.normalization)
    return reshaped


def _config_of(variant: dict[str, Any], path: Path) -> ModelConfig:
    net_kwargs = dict(variant["net_kwargs"])
    implied = "deit" if net_kwargs.get("distilled") else "vit"  # of files that do not say it, which none published is
    net_kwargs.setdefault("normalization", _section(variant, "dataset_kwargs").get("normalization") or implied)
    try:
        return ModelConfig.from_dict(net_kwargs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _info_of(variant: dict[str, Any], config: ModelConfig, source: str, path: Path) -> ModelInfo:
    dataset, windows = _section(variant, "dataset_kwargs"), _section(variant, "inference_kwargs")
    size = max(config.image_size) if windows.get("window_size") is None else windows["window_size"]
    stride = size if windows.get("window_stride") is None else windows["window_stride"]
    try:
        check_windows(size, stride, config.image_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    normalization = dataset.get("normalization")
    return ModelInfo(
        normalization=normalization if normalization in NORMALIZATIONS else config.normalization,
        window_size=size,
        window_stride=stride,
        classes=_CLASSES.get((str(dataset.get("dataset")), config.n_cls)),
        weights="trained",
        source=source,
    )


def variant_of(model: Segmenter) -> dict[str, Any]:
    """A variant.yml for a model that came without one."""
    config, info = model.config.to_dict(), model.info
    config["decoder"] = {**config["decoder"], "n_cls": config["n_cls"]}
    size = min(config["image_size"])
    return {
        "net_kwargs": config,
        "dataset_kwargs": {"dataset": info.classes, "image_size": size, "normalization": info.normalization},
        "inference_kwargs": {
            "im_size": size,
            "window_size": info.window_size,
            "window_stride": info.window_stride,
        },
    }


def _section(variant: dict[str, Any], name: str) -> dict[str, Any]:
    return variant[name] if isinstance(variant.get(name), dict) else {}


def _mmseg_classes(extra: Mapping[str, Any], n_cls: int) -> str | None:
    """The class set by the names that mmsegmentation stores: meta.CLASSES (0.x) or meta.dataset_meta.classes (1.x).

    What is stored may be anything: only plain containers of text are looked into.
    """
    meta = _entry(extra, "meta")
    names = _entry(meta, "CLASSES") or _entry(_entry(meta, "dataset_meta"), "classes")
    if type(names) not in (list, tuple) or len(names) != n_cls or type(names[0]) is not str:
        return None
    return _CLASSES.get((_FIRST_CLASS.get(names[0]), n_cls))


def _entry(mapping: Any, name: str) -> Any:
    value = dict.get(mapping, name) if isinstance(mapping, dict) else None
    return value if isinstance(value, dict) or type(value) in (list, tuple) else None


def _fields_beside(folder: Path, kind: str | None) -> dict[str, Any]:
    """What the JSON files that Hugging Face and timm put beside weights add to them, as arguments of `convert`."""
    path, fields = folder / "config.json", {}
    if kind in ("hf", "timm") and os.path.isfile(path):
        content = read_json(path, CheckpointError)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: must hold a JSON object")
        if kind == "hf" or "architecture" in content:
            try:
                fields = hugging_face_fields(content) if kind == "hf" else timm_fields(content)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
    path = folder / "preprocessor_config.json"
    if kind == "hf" and os.path.isfile(path):
        content = read_json(path, CheckpointError)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: must hold a JSON object")
        if content.get("image_mean") is not None:
            fields["normalization"] = normalization_of(content["image_mean"])
    return fields
