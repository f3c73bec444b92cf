"""Our own format: a folder with model.safetensors, config.json and, for own classes, classes.json.

config.json is what makes a save valid: it holds the sha256 of the weights that belong to it. New weights are first
written beside the old ones as model.safetensors.new; then config.json is replaced; then the weights are renamed. Killed
at any point, the folder reads as before or as after: whichever of the two weight files has the sum in config.json.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segmenter.checkpoint import CheckpointError, read_state_dict
from segmenter.config import NORMALIZATIONS, ConfigError, ModelConfig, check_windows
from segmenter.errors import printable
from segmenter.model import ModelInfo, Segmenter
from segmenter.state import build
from segmenter.text_files import read_json

if TYPE_CHECKING:
    from segmenter.classes import ClassSet

SCHEMA = 1
CONFIG, WEIGHTS, NEW_WEIGHTS, CLASSES = "config.json", "model.safetensors", "model.safetensors.new", "classes.json"
_STATES = ("random", "encoder", "trained")


def is_ours(folder: Path) -> bool:
    """Whether `folder` has a config.json of this format (those of Hugging Face models are not).

    Raises:
        CheckpointError: it has one that cannot be read, so nothing can be said.
    """
    return (folder / CONFIG).exists() and _read_json(folder / CONFIG).get("format") == "segmenter"


def save_pretrained(
    model: Segmenter,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    classes: "str | os.PathLike | ClassSet | None" = None,
) -> None:
    """Writes a folder that `from_pretrained` reads; it is never left half-written, even by a kill or a full disk.

    Args:
        model: built by `create_segmenter` or loaded. folder: made if missing; an older save in it is replaced.
        dtype: how the weights are stored, torch.float16 for half the size; loading makes them float32 again.
        classes: key of a class set, a class file or a ClassSet; default `model.info.classes`. A file is copied.
    Raises:
        CheckpointError: weights overflow in `dtype`. ClassesError: the classes do not fit the model. ValueError: the
            model has no configuration. OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    from segmenter.classes import CLASS_SETS, ClassesError, ClassSet, load_classes

    if model.config is None:
        raise ValueError("model.config is None; set it to the ModelConfig that builds this model, then save")
    state = {name: _stored(name, tensor, dtype) for name, tensor in model.state_dict().items()}
    info = dataclasses.asdict(model.info)
    classes = classes if classes is not None else model.info.classes
    class_set = classes if classes is None or isinstance(classes, ClassSet) else load_classes(classes)
    if class_set is not None and len(class_set) != model.n_cls:
        raise ClassesError(f"the class set {class_set.name} has {len(class_set)} classes, the model {model.n_cls}")
    is_key = class_set is not None and str(classes) in CLASS_SETS
    info["classes"] = None if class_set is None else str(classes) if is_key else CLASSES

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted_save(folder)
    new = folder / NEW_WEIGHTS
    try:
        new.touch()
        mode = new.stat().st_mode
        save_file(state, new, metadata={"format": "pt"})
        new.chmod(mode)  # save_file makes files that nobody else may read
        _flush(new)
        if info["classes"] == CLASSES:
            colors = zip(class_set.names, class_set.palette, strict=True)
            entries = [{"id": i, "name": name, "color": list(color)} for i, (name, color) in enumerate(colors)]
            _write_json(folder / CLASSES, entries)
        content = {
            "format": "segmenter",
            "schema": SCHEMA,
            "model": model.config.to_dict(),
            "info": info,
            "sha256": _sha256(new),
        }
        _write_json(folder / CONFIG, content)
    except BaseException:
        _finish_interrupted_save(folder)  # Ctrl-C just after config.json was replaced
        new.unlink(missing_ok=True)
        raise
    os.replace(new, folder / WEIGHTS)
    _flush(folder)


def from_pretrained(
    folder: str | os.PathLike,
    *,
    impl: str = "auto",
    device: str | torch.device | None = None,
    hub: bool = False,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> Segmenter:
    """Reads what `save_pretrained` wrote; the model is in evaluation mode, its weights are float32.

    Args:
        folder: a local folder; only with `hub` also the name of a repository ("owner/name") on the Hugging Face hub.
        impl, device: as in `load_model`.
        verify: compares the sha256 of the weights with the one in config.json.
    Raises:
        CheckpointError: no such folder, or something in it is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        if not hub:
            raise CheckpointError(f"{folder}: no such folder; hub=True would look for it on the Hugging Face hub")
        path = _download(str(folder))
    content = _read_json(path / CONFIG)
    if content.get("format") != "segmenter" or type(content.get("schema")) is not int:
        raise CheckpointError(f"{path / CONFIG}: was not written by save_pretrained of segmenter")
    if content["schema"] > SCHEMA:
        raise CheckpointError(f"{path / CONFIG}: schema {content['schema']} is newer than this version reads; update")
    weights = _weights_of(path, content.get("sha256"), verify)
    state, _ = read_state_dict(weights, verify=verify, allow_nonfinite=allow_nonfinite)
    try:
        config = ModelConfig.from_dict(content.get("model"))
    except ConfigError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    model = build(config, state, impl, str(weights))
    model.info = _info(path, content.get("info"), config)
    return model.to(device) if device is not None else model


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    if dtype is not None and not torch.isfinite(stored).all() and torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} overflows in {dtype}; store float32 or bfloat16")
    return stored


def _weights_of(folder: Path, sha256: Any, verify: bool) -> Path:
    """The weight file that belongs to config.json."""
    candidates = [folder / name for name in (WEIGHTS, NEW_WEIGHTS) if (folder / name).is_file()]
    if not candidates:
        raise CheckpointError(f"{folder}: has no {WEIGHTS}")
    if candidates == [folder / WEIGHTS] and not verify:
        return candidates[0]
    for path in candidates:
        if _sha256(path) == sha256:
            return path
    raise CheckpointError(
        f"{candidates[0]}: damaged, its sha256 differs from that in {CONFIG}; copy or download it again "
        f"(verify=False loads it all the same)"
    )


def _finish_interrupted_save(folder: Path) -> None:
    new = folder / NEW_WEIGHTS
    if new.is_file():
        with contextlib.suppress(CheckpointError):
            if _read_json(folder / CONFIG).get("sha256") == _sha256(new):
                os.replace(new, folder / WEIGHTS)
                _flush(folder)


def _info(folder: Path, values: Any, config: ModelConfig) -> ModelInfo:
    known = {field.name for field in dataclasses.fields(ModelInfo)}
    info = ModelInfo(**{k: v for k, v in values.items() if k in known}) if isinstance(values, dict) else ModelInfo()
    if (
        info.normalization not in NORMALIZATIONS
        or info.weights not in _STATES
        or not isinstance(info.classes, str | None)
        or not isinstance(info.source, str)
    ):
        raise CheckpointError(f"{folder / CONFIG}: the values under info are wrong: {values!r:.200}")
    try:
        check_windows(info.window_size, info.window_stride, config.image_size)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: the values under info are wrong: {error}") from error
    info.source = printable(info.source)
    if info.classes == CLASSES:
        info.classes = str(folder / CLASSES)
    return info


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such folder, and the hub needs huggingface_hub; pip install segmenter-triton[hub]"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CLASSES]))
    except Exception as error:  # no network, no such repository, no access: many types
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: no such folder, and the hub did not give it ({reason})") from error


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def _write_json(path: Path, content: Any) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(new)
    os.replace(new, path)


def _flush(path: Path) -> None:
    """Forces a file, or the entries of a folder, onto the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
