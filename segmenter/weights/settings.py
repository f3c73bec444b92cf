"""What lies beside weights and adds to them: variant.yml (published code), JSON of Hugging Face and timm, class names.

None of it can name Python objects, and whatever is wrong with a file is said with its path.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segmenter.config import NORMALIZATION, ConfigError, ModelConfig, ModelInfo, check_windows
from segmenter.errors import InputError
from segmenter.model import Segmenter
from segmenter.text_files import read_yaml
from segmenter.weights.read import CheckpointError, read_json_object

_HF_TYPES = ("vit", "deit", "vit_msn", "vit_mae", "dinov2", "dinov2_with_registers", "dinov3_vit")  # that are read
_CLASSES = {  # (data set, number of classes) -> key of the class set
    ("ade20k", 150): "ade20k",
    ("pascal_context", 60): "pascal_context",
    ("pascal_context", 59): "pascal_context_59",
    ("cityscapes", 19): "cityscapes",
    ("camvid", 11): "camvid",
}
_FIRST_CLASS = {"wall": "ade20k", "background": "pascal_context", "aeroplane": "pascal_context", "road": "cityscapes"}


@contextlib.contextmanager
def naming(path: Path, kind: type[InputError]) -> Iterator[None]:
    """Puts `path` before the message of an error of this kind."""
    try:
        yield
    except kind as error:
        raise kind(f"{path}: {error}") from error


def read_published(path: str | os.PathLike) -> dict[str, Any]:
    """The whole of a variant.yml as plain types; `net_kwargs` is a mapping in it.

    Numbers without a dot such as 1e-5 come as text (YAML 1.1); `ModelConfig.from_dict` reads them.

    Raises:
        CheckpointError: what `read_yaml` refuses, or no `net_kwargs`.
    """
    settings = read_yaml(path, CheckpointError, tuples=True)
    if not isinstance(settings, dict) or not isinstance(settings.get("net_kwargs"), dict):
        raise CheckpointError(f"{path}: has no net_kwargs; it must be the variant.yml that training wrote")
    return settings


def published_config(settings: dict[str, Any], path: Path) -> ModelConfig:
    """The model of a variant.yml. Raises ConfigError: it cannot be built."""
    net_kwargs = dict(settings["net_kwargs"])
    implied = "deit" if net_kwargs.get("distilled") else "vit"  # of files that do not say it, which none published is
    net_kwargs.setdefault("normalization", _section(settings, "dataset_kwargs").get("normalization") or implied)
    with naming(path, ConfigError):
        return ModelConfig.from_dict(net_kwargs)


def published_info(settings: dict[str, Any], config: ModelConfig, source: str, path: Path) -> ModelInfo:
    """What else a variant.yml says. Raises ConfigError: windows that the model cannot have."""
    dataset, windows = _section(settings, "dataset_kwargs"), _section(settings, "inference_kwargs")
    size = max(config.image_size) if windows.get("window_size") is None else windows["window_size"]
    stride = size if windows.get("window_stride") is None else windows["window_stride"]
    with naming(path, ConfigError):
        check_windows(size, stride, config.image_size)
    normalization = dataset.get("normalization")
    return ModelInfo(
        normalization=normalization if normalization in NORMALIZATION else config.normalization,
        window_size=size,
        window_stride=stride,
        classes=_CLASSES.get((str(dataset.get("dataset")), config.n_cls)),
        weights="trained",
        source=source,
    )


def as_published(model: Segmenter) -> dict[str, Any]:
    """The content of a variant.yml for a model that came without one."""
    config, info = model.config.to_dict(), model.info
    config["decoder"] = {**config["decoder"], "n_cls": config["n_cls"]}
    size = min(config["image_size"])
    return {
        "net_kwargs": config,
        "dataset_kwargs": {"dataset": info.classes, "image_size": size, "normalization": info.normalization},
        "inference_kwargs": {"im_size": size, "window_size": info.window_size, "window_stride": info.window_stride},
    }


def fields_beside(directory: Path, kind: str) -> dict[str, Any]:
    """What the JSON files that Hugging Face and timm put beside weights add to them, as arguments of `convert`.

    Raises:
        CheckpointError: they cannot be read, or tell of another architecture.
    """
    path, fields = directory / "config.json", {}
    if kind in ("hf", "timm") and os.path.isfile(path):
        content = read_json_object(path)
        if kind == "hf" or "architecture" in content:
            with naming(path, CheckpointError):
                fields = hugging_face_fields(content) if kind == "hf" else timm_fields(content)
    path = directory / "preprocessor_config.json"
    if kind == "hf" and os.path.isfile(path):
        content = read_json_object(path)
        if content.get("image_mean") is not None:
            fields["statistics"] = (content["image_mean"], content.get("image_std"))
    return fields


def hugging_face_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a Hugging Face ViT tells beyond its weights: ModelConfig fields, and `source_size`.

    Raises:
        CheckpointError: it is no plain ViT, or its MLP does not use the exact GELU.
    """
    model_type, act = config.get("model_type") or "vit", config.get("hidden_act", "gelu")
    if model_type not in _HF_TYPES:
        hint = "; segmenter.load_eomt and `segmenter predict` take it" if "eomt" in str(model_type) else ""
        raise CheckpointError(
            f"model_type {model_type!r} is none of the plain ViTs known here ({', '.join(_HF_TYPES)}){hint}"
        )
    if act != "gelu":
        raise CheckpointError(f"hidden_act is {act!r}; the Segmenter encoder needs the exact gelu")
    names = {"layer_norm_eps": "norm_eps", "num_attention_heads": "n_heads", "image_size": "source_size"}
    names |= {"rope_theta": "rope_theta"} if model_type == "dinov3_vit" else {}
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def timm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json that timm puts beside weights tells beyond them, as `hugging_face_fields`.

    Raises:
        CheckpointError: an architecture that is no plain ViT although its weights have the names of one.
    """
    name, arguments, trained = (config.get(part) for part in ("architecture", "model_args", "pretrained_cfg"))
    arguments, trained = (part if isinstance(part, dict) else {} for part in (arguments, trained))
    fields: dict[str, Any] = {"pos_embed": "rotary"} if "dinov3" in str(name) else {}
    for part, what in (("rope", "rotary positions"), ("quickgelu", "the quick GELU")):
        if part in str(name):
            raise CheckpointError(f"{name} has {what}, which the Segmenter encoder has not")
    act = arguments.get("act_layer") or "gelu"
    if act != "gelu":
        raise CheckpointError(f"act_layer is {act!r}; the Segmenter encoder needs the exact gelu")
    size = trained.get("input_size")
    size = arguments.get("img_size") or (size[1:] if isinstance(size, list) else None)
    fields |= {"source_size": size, "n_heads": arguments.get("num_heads")}
    if trained.get("mean") is not None:
        fields["statistics"] = (trained["mean"], trained.get("std"))
    if arguments.get("no_embed_class") is not None:
        fields["pos_embed"] = "patches" if arguments["no_embed_class"] else "all"
    return {name: value for name, value in fields.items() if value is not None}


def normalization_of(mean: Any, std: Any = None) -> str:
    """The key of NORMALIZATION with these statistics of the three channels; an std that is not said may be any.

    Raises:
        CheckpointError: none has them.
    """
    for name, known in NORMALIZATION.items():
        if all(given is None or _near(given, values) for given, values in zip((mean, std), known, strict=True)):
            return name
    raise CheckpointError(
        f"the input was normalised by mean {mean!r:.80} and std {std!r:.80}, which are the statistics of none of "
        f"{', '.join(NORMALIZATION)}; give normalization to take one of these all the same"
    )


def _near(given: Any, values: tuple[float, ...]) -> bool:
    if not isinstance(given, list | tuple) or len(given) != 3 or not all(isinstance(v, int | float) for v in given):
        return False
    return all(abs(a - b) < 1e-3 for a, b in zip(given, values, strict=True))


def mmseg_classes(extra: Mapping[str, Any], n_cls: int) -> str | None:
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


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return settings[name] if isinstance(settings.get(name), dict) else {}
