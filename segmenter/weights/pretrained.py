"""Our own format: a folder with model.safetensors, config.json and, for own classes, classes.json.

Weights are stored as they are, as float16 or bfloat16, or as int8 with scales (`segmenter.weights.int8`); config.json
says the last, in "storage" and by its schema, so that older versions do not take the integers for weights.

config.json is what makes a save valid: it holds the sha256 of the files that belong to it, and its own. New files are
first written beside the old ones under the names in `_NEW`; then config.json is replaced; then they are renamed. Killed
at any point, the folder reads as before or as after: of two files, the one with the sum in config.json. Two saves at
once take turns. A reader that finds a file replaced while it reads begins again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segmenter.config import NORMALIZATIONS, ConfigError, ModelConfig, ModelInfo, check_windows
from segmenter.errors import cause, printable
from segmenter.files import flush, open_regular, write_atomically, write_text, writing_into
from segmenter.model import Segmenter
from segmenter.weights.build import build
from segmenter.weights.int8 import quantised, restored
from segmenter.weights.read import CheckpointError, listing, read_json_object, read_state_dict
from segmenter.weights.recognise import Recognised
from segmenter.weights.settings import naming

if TYPE_CHECKING:
    from segmenter.classes import ClassSet

SCHEMA = 2  # 1: all but int8
CONFIG, WEIGHTS, NEW_WEIGHTS, CLASSES = "config.json", "model.safetensors", "model.safetensors.new", "classes.json"
NEW_CLASSES = "classes.new.json"
_NEW = {WEIGHTS: NEW_WEIGHTS, CLASSES: NEW_CLASSES}
_SUMS = {WEIGHTS: "sha256", CLASSES: "classes_sha256"}  # file -> where config.json has its sum
_CONFIG_SUM = "config_sha256"  # of all else in config.json
_STORAGE, _INT8 = "storage", "int8"
_TURN = 300  # seconds that a save waits for another one into the same folder
_READS = 50  # before a folder counts as one that is written all the time
_STATES = ("random", "encoder", "trained")


def is_ours(directory: Path) -> bool:
    """Whether `directory` has a config.json of this format (those of Hugging Face models are not).

    Raises:
        CheckpointError: it has one that cannot be read, so nothing can be said.
    """
    return os.path.exists(directory / CONFIG) and read_json_object(directory / CONFIG).get("format") == "segmenter"


def save_pretrained(
    model: Segmenter,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    keep: Collection[str] = (),
    classes: "str | os.PathLike | ClassSet | None" = None,
) -> None:
    """Writes a folder that `from_pretrained` reads; it is never left half-written, even by a kill or a full disk.

    Args:
        model: built by `create_segmenter` or loaded. folder: made if missing; an older save in it is replaced.
        dtype: how the weights are stored, torch.float16 for half the size, torch.int8 for a quarter (see
            `segmenter.weights.int8`); None: as they are. Loading makes them float32 again.
        keep: with int8, names of weights that are stored as float16 all the same.
        classes: key of a class set, a class file or a ClassSet; default `model.info.classes`. A file is copied.
    Raises:
        CheckpointError: weights overflow in `dtype`, or there are none of a name in `keep`. ClassesError: the classes
            do not fit the model. ConfigError: windows that loading would refuse. ValueError: the model has no
            configuration, its weights are split among processes, or `dtype` stores none. OSError: the folder cannot be
            written.
    """
    parts = contents(model, dtype=dtype, keep=keep, classes=classes)
    config = parts.pop(CONFIG)
    with writing_into(directory := Path(folder), wait=_TURN):
        _finish_interrupted_save(directory)
        try:
            for name, data in parts.items():
                _write_new(directory, name, data)
            write_text(directory / CONFIG, config.decode())
        finally:  # also after Ctrl-C just when config.json was replaced
            _finish_interrupted_save(directory)


def contents(
    model: Segmenter,
    *,
    dtype: torch.dtype | None = None,
    keep: Collection[str] = (),
    classes: "str | os.PathLike | ClassSet | None" = None,
) -> dict[str, bytes]:
    """Name -> content of the files that `save_pretrained` writes, whose arguments and errors it has."""
    from safetensors.torch import save

    from segmenter.classes import CLASS_SETS, ClassesError, ClassSet, load_classes

    if model.config is None:
        raise ValueError("model.config is None; set it to the ModelConfig that builds this model, then save")
    if dtype not in (None, torch.int8) and not dtype.is_floating_point:
        raise ValueError(f"weights are stored as a floating type or torch.int8, not {dtype}")
    check_windows(model.info.window_size, model.info.window_stride, model.config.image_size)
    state = _stored(model.state_dict(), dtype, keep)
    info = dataclasses.asdict(model.info)
    classes = classes if classes is not None else model.info.classes
    class_set = classes if classes is None or isinstance(classes, ClassSet) else load_classes(classes)
    if class_set is not None and len(class_set) != model.n_cls:
        raise ClassesError(f"the class set {class_set.name} has {len(class_set)} classes, the model {model.n_cls}")
    is_key = class_set is not None and str(classes) in CLASS_SETS
    info["classes"] = None if class_set is None else str(classes) if is_key else CLASSES

    parts = {WEIGHTS: save(state, metadata={"format": "pt"})}
    if info["classes"] == CLASSES:
        colors = zip(class_set.names, class_set.palette, strict=True)
        entries = [{"id": i, "name": name, "color": list(color)} for i, (name, color) in enumerate(colors)]
        parts[CLASSES] = _json(entries).encode()
    storage = {"schema": SCHEMA, _STORAGE: _INT8} if dtype == torch.int8 else {"schema": 1}
    content = {"format": "segmenter", **storage, "model": model.config.to_dict(), "info": info}
    content |= {_SUMS[name]: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    return {**parts, CONFIG: _json(content | {_CONFIG_SUM: _config_sum(content)}).encode()}


def files_of(folder: str | os.PathLike) -> dict[str, Path]:
    """Name -> file, of the files of a save and no others; one that was interrupted may have them under other names.

    Raises:
        CheckpointError: no save of this format, or a file of it is missing or damaged.
    """
    path = Path(folder)
    content = read_json_object(path / CONFIG)
    if content.get("format") != "segmenter":
        raise CheckpointError(f"{path / CONFIG}: was not written by save_pretrained of segmenter")
    info = content.get("info")
    names = [WEIGHTS, CLASSES] if isinstance(info, dict) and info.get("classes") == CLASSES else [WEIGHTS]
    found: dict[str, Path] = {CONFIG: path / CONFIG}
    for name in names:
        file = _file_of(path, name, content, verify=True)
        if file is None:
            raise CheckpointError(f"{path}: has no {name}")
        found[name] = file
    return found


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
    if not os.path.isdir(path):
        if not hub:
            raise CheckpointError(f"{folder}: no such folder; hub=True would look for it on the Hugging Face hub")
        path = _download(str(folder))
    for _ in range(_READS):
        before = _identities(path)
        try:
            model = _read(path, impl, verify, allow_nonfinite)
        except CheckpointError:
            if _identities(path) == before:
                raise
        else:
            if _identities(path) == before:
                return model.to(device) if device is not None else model
        time.sleep(0.01)
    raise CheckpointError(f"{path}: is written again and again; read it when that has ended")


def _read(path: Path, impl: str, verify: bool, allow_nonfinite: bool) -> Segmenter:
    content = read_json_object(path / CONFIG)
    if content.get("format") != "segmenter" or type(content.get("schema")) is not int:
        raise CheckpointError(f"{path / CONFIG}: was not written by save_pretrained of segmenter")
    if content["schema"] > SCHEMA:
        raise CheckpointError(f"{path / CONFIG}: schema {content['schema']} is newer than this version reads; update")
    known = {"format", "schema", _STORAGE, "model", "info", *_SUMS.values(), _CONFIG_SUM}
    if verify and (other := [name for name in content if name not in known]):  # perhaps the name of a sum, damaged
        raise CheckpointError(f"{path / CONFIG}: has unknown entries: {listing(other)} (verify=False passes them over)")
    weights = _file_of(path, WEIGHTS, content, verify)
    if weights is None:
        raise CheckpointError(f"{path}: has no {WEIGHTS}")
    state, _ = read_state_dict(weights, verify=verify, allow_nonfinite=allow_nonfinite)
    if content.get(_STORAGE, _INT8) != _INT8:
        raise CheckpointError(f"{path / CONFIG}: storage {content[_STORAGE]!r:.40} is unknown; {_INT8} is known")
    if _STORAGE in content:
        with naming(weights, CheckpointError):
            state = restored(state)
    try:
        config = ModelConfig.from_dict(content.get("model"))
    except ConfigError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    model = build(Recognised(state, config), impl, str(weights))
    model.info = _info(path / CONFIG, content.get("info"), config)
    if model.info.classes == CLASSES:
        model.info.classes = str(_file_of(path, CLASSES, content, verify) or path / CLASSES)
    if verify and content.get(_CONFIG_SUM, found := _config_sum(content)) != found:  # older folders have none
        raise CheckpointError(
            f"{path / CONFIG}: its content does not fit its {_CONFIG_SUM}; if you have edited it, delete that "
            f"entry, else copy or download it again (verify=False loads it all the same)"
        )
    return model


def _identities(directory: Path) -> list[tuple[int, ...] | None]:
    """What tells whether a save has replaced a file."""
    found: list[tuple[int, ...] | None] = []
    for name in _NEW:
        try:
            status = os.stat(directory / name)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def _stored(
    state: dict[str, torch.Tensor], dtype: torch.dtype | None, keep: Collection[str]
) -> dict[str, torch.Tensor]:
    """What model.safetensors holds of a model's weights."""
    if keep and dtype != torch.int8:
        raise ValueError(f"keep is for dtype torch.int8, not {dtype}")
    if unknown := [name for name in keep if name not in state]:
        raise CheckpointError(f"weights to keep: the model has none called {listing(unknown)}")
    stored = {}
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):  # a DTensor
            raise ValueError(f"{name} is split among processes; gather it first, see `segmenter.training.distributed`")
        tensor = tensor.detach().cpu().contiguous()
        matrix = quantised(name, tensor) if dtype == torch.int8 and name not in keep else {}
        stored |= matrix or {name: _converted(name, tensor, torch.float16 if dtype == torch.int8 else dtype)}
    return stored


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not tensor.is_floating_point():  # of a batch norm: how many batches it has seen
        return tensor
    stored = tensor.to(dtype or tensor.dtype)
    if dtype is not None and not torch.isfinite(stored).all() and torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} overflows in {dtype}; store float32 or bfloat16")
    return stored


def _file_of(directory: Path, name: str, content: dict[str, Any], verify: bool) -> Path | None:
    """The file called `name` that belongs to the `content` of config.json; None: there is none."""
    candidates = [path for path in (directory / name, directory / _NEW[name]) if path.is_file()]
    has_sum = name == WEIGHTS or _SUMS[name] in content  # older folders have none of their classes
    if not candidates or candidates == [directory / name] and not (verify and has_sum):
        return candidates[0] if candidates else None
    for path in candidates:
        if _sha256(path) == content.get(_SUMS[name]):
            return path
    raise CheckpointError(
        f"{candidates[0]}: damaged, its sha256 differs from that in {CONFIG}; copy or download it again "
        f"(verify=False loads it all the same)"
    )


def _write_new(directory: Path, name: str, data: bytes) -> None:
    try:
        write_atomically(directory / _NEW[name], lambda file: file.write(data))
    except OSError as error:
        error.filename = str(directory / name)
        raise


def _finish_interrupted_save(directory: Path) -> None:
    """Puts the files in place that belong to config.json, and deletes the others."""
    content: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        content = read_json_object(directory / CONFIG)
    for name, new in _NEW.items():
        if (directory / new).is_file():
            if content.get(_SUMS[name]) == _sha256(directory / new):
                os.replace(directory / new, directory / name)
            (directory / new).unlink(missing_ok=True)
            flush(directory)


def _info(path: Path, values: Any, config: ModelConfig) -> ModelInfo:
    known = {field.name for field in dataclasses.fields(ModelInfo)}
    info = ModelInfo(**{k: v for k, v in values.items() if k in known}) if isinstance(values, dict) else ModelInfo()
    if (
        info.normalization not in NORMALIZATIONS
        or info.weights not in _STATES
        or not isinstance(info.classes, str | None)
        or not isinstance(info.source, str)
    ):
        raise CheckpointError(f"{path}: the values under info are wrong: {values!r:.200}")
    try:
        check_windows(info.window_size, info.window_stride, config.image_size)
    except ConfigError as error:
        raise CheckpointError(f"{path}: the values under info are wrong: {error}") from error
    info.source = printable(info.source)
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
        raise CheckpointError(f"{name}: no such folder, and the hub did not give it ({cause(error)})") from error


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _config_sum(content: dict[str, Any]) -> str:
    """The sum of what config.json says, however it is written."""
    others = {name: value for name, value in content.items() if name != _CONFIG_SUM}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({cause(error)})") from error
    return digest.hexdigest()
