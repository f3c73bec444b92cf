"""Models from files: `load_model` as in the published code, `load_any` for everything else, and conversion.

Nothing here opens a network connection, except `from_pretrained` and `load_any` with hub=True.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from segmenter.config import ConfigError, ModelConfig, ModelInfo, preset
from segmenter.errors import InputError, cause, printable
from segmenter.model import Segmenter, create_segmenter
from segmenter.ops import ImplementationError
from segmenter.weights.build import build, load_state
from segmenter.weights.convert import convert
from segmenter.weights.pretrained import WEIGHTS, from_pretrained, is_ours, save_pretrained
from segmenter.weights.read import CheckpointError, listing, read_weights
from segmenter.weights.recognise import Recognised, recognise
from segmenter.weights.settings import (
    as_published,
    fields_beside,
    mmseg_classes,
    naming,
    published_config,
    published_info,
    read_published,
)

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
        (model, settings): settings is the whole variant.yml, or the same made up where there is none.
    Raises:
        CheckpointError: the file or what is beside it is unusable, or has no decoder. ConfigError, in variant.yml.
    """
    options = {"allow_pickle": allow_pickle, "verify": verify, "allow_nonfinite": allow_nonfinite, "averaged": averaged}
    loaded = _from_path(Path(model_path), impl, options, {})
    model = loaded.model.to(device) if device is not None else loaded.model
    return model, loaded.published or as_published(model)


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
    model = _load(source, impl, hub, options, request).model
    if classes is not None:
        model.info.classes = classes
    return model.to(device) if device is not None else model


def convert_checkpoint(
    source: str | os.PathLike | nn.Module,
    out_folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    keep: Collection[str] = (),
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
        dtype, keep: how the weights are stored, see `save_pretrained`. Others: as in `load_any`.
    Raises:
        CheckpointError, ConfigError: as `load_any`. ValueError, OSError: as `save_pretrained`.
    """
    options = {"allow_pickle": allow_pickle, "verify": verify, "allow_nonfinite": allow_nonfinite, "averaged": averaged}
    loaded = _load(source, "eager", hub, options, request)
    model = loaded.model
    save_pretrained(model, out_folder, dtype=dtype, keep=keep, classes=classes)
    name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    return ConversionReport(
        source=name,
        folder=str(out_folder),
        kind=loaded.kind,
        weights=model.info.weights,
        n_parameters=sum(p.numel() for p in model.parameters()),
        config=model.config,
        notes=loaded.notes,
    )


@dataclasses.dataclass
class _Loaded:
    model: Segmenter
    kind: str  # what the report calls the source
    notes: list[str]
    published: dict[str, Any] | None = None  # the variant.yml beside the weights


def _load(
    source: str | os.PathLike | nn.Module, impl: str, hub: bool, options: dict[str, Any], request: dict[str, Any]
) -> _Loaded:
    request = {name: value for name, value in request.items() if value is not None}
    if isinstance(source, nn.Module):
        _only_one_set(f"a live {type(source).__name__}", options)
        found = convert(source, **request)
        if found.difference is not None:
            found.notes.append(f"its tokens are those of the live model, to {found.difference:.0e} (exact)")
        return _Loaded(_assemble(found, impl, f"live {type(source).__name__}"), found.kind, found.notes)
    if os.path.exists(Path(source)):
        return _from_path(Path(source), impl, options, request)
    _only_one_set(str(source), options)
    if hub:
        model = from_pretrained(source, impl=impl, hub=True, verify=options["verify"])
        return _reshaped(_Loaded(model, "segmenter", []), impl, request)
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
    return _Loaded(create_segmenter(config, impl).eval(), "preset", ["random weights"])


def _from_path(path: Path, impl: str, options: dict[str, Any], request: dict[str, Any]) -> _Loaded:
    is_directory = os.path.isdir(path)
    directory = path if is_directory else path.parent
    if (is_directory or path.name == WEIGHTS) and is_ours(directory):
        _only_one_set(str(directory), options)
        checks = {name: options[name] for name in ("verify", "allow_nonfinite")}
        return _reshaped(_Loaded(from_pretrained(directory, impl=impl, **checks), "segmenter", []), impl, request)
    path = _weight_file(directory) if is_directory else path
    file = read_weights(path, **options)
    if options["averaged"] is None:
        for note in (note for note in file.notes if "averaged=" in note):  # it names the way to the other set
            warnings.warn(printable(f"{path}: {note}"), stacklevel=4)
    source = printable("/".join(path.absolute().parts[-2:]))
    with naming(path, CheckpointError):
        kind = recognise(file.state, request.get("kind"))
    if kind == "segmenter" and any(name.startswith("decoder.") for name in file.state):
        beside = directory / "variant.yml"
        if os.path.isfile(beside):
            published = read_published(beside)
            with _refusing(path):
                model = build(Recognised(file.state, published_config(published, beside), kind), impl, str(path))
                model.info = published_info(published, model.config, source, beside)
                return _reshaped(_Loaded(model, kind, list(file.notes), published), impl, request)
        text = "no variant.yml beside it: sizes are read off the weights; normalization and windows are guessed"
        warnings.warn(printable(f"{path}: {text}"), stacklevel=4)
    request = {**fields_beside(directory, kind), **request, "kind": kind}
    with _refusing(path):
        with naming(path, CheckpointError):
            found = convert(file.state, **request)
        model = _assemble(found, impl, source)
    if kind == "mmseg":
        model.info.window_stride = max(model.info.window_size - 32, 1)
        model.info.classes = mmseg_classes(file.extra, model.n_cls)
    return _Loaded(model, kind, file.notes + found.notes)


def _weight_file(directory: Path) -> Path:
    for name in _WEIGHT_FILES:
        if os.path.isfile(directory / name):
            return directory / name
    if shards := next(directory.glob("*.index.json"), None):
        raise CheckpointError(
            f"{directory}: its weights are in several files ({shards.name}), which are not read; save them in "
            "one, in transformers with save_pretrained(..., max_shard_size='100GB')"
        )
    raise CheckpointError(f"{directory}: has none of {', '.join(_WEIGHT_FILES)}; give the weight file itself")


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


def _assemble(found: Recognised, impl: str, source: str) -> Segmenter:
    model = build(found, impl, source)
    window = max(found.config.image_size)
    model.info = ModelInfo(
        normalization=found.config.normalization,
        window_size=window,
        window_stride=window,
        weights="trained" if found.has_decoder else "encoder",
        source=f"{source} ({found.kind})",
    )
    return model


def _reshaped(loaded: _Loaded, impl: str, request: Mapping[str, Any]) -> _Loaded:
    """`loaded` itself if `request` asks for nothing, else a model of another image or patch size with its weights."""
    request = {name: value for name, value in request.items() if name != "kind"}
    if not request:
        return loaded
    model = loaded.model
    config = dataclasses.asdict(model.config)
    for derived in ("image_size", "patch_size", "d_model", "n_layers", "n_cls", "distilled"):
        del config[derived]
    grid = model.encoder.patch_embed.grid_size
    found = convert(model.state_dict(), kind="segmenter", grid=grid, **{**config, **request})
    reshaped = build(found, impl, "the weights")
    reshaped.info = dataclasses.replace(model.info, normalization=found.config.normalization)
    return _Loaded(reshaped, loaded.kind, loaded.notes + found.notes, loaded.published)
