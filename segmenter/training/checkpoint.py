"""A training run on the disk: what it is resumed from, its log, and the models it leaves.

    checkpoint.pth   everything the next step follows from; its "model" is read by `load_model` too (the weights as
                     they are trained; best/ and final/ hold their average, if there is one)
    variant.yml      what the published code reads beside a checkpoint.pth
    recipe.yml       the settings
    log.jsonl        a JSON line each few steps, and each evaluation
    best/, final/    models: the best on val so far, and that after the last step
    overlays/        images of val as the model labels them

Each file but the log is written under another name and renamed, so a kill at any time loses the steps since the last
save and nothing else. The leading process keeps the folder locked. No random state is saved: dropout follows from
(seed, step, process), samples from (seed, epoch, sample).

A checkpoint ends with the sha256 of all that comes before, as the comment that zip files may have.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from segmenter.errors import cause
from segmenter.files import append, open_regular, remove_leftovers, write_atomically, write_text, writing_into
from segmenter.text_files import parse_json
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.weights.read import CheckpointError

CHECKPOINT, VARIANT, RECIPE, LOG = "checkpoint.pth", "variant.yml", "recipe.yml", "log.jsonl"
BEST, FINAL, OVERLAYS = "best", "final", "overlays"
SCHEMA = 2  # 1 had no sum
_MARK = b"sha256 "
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_LENGTH = struct.pack("<H", _COMMENT)  # of the comment: the last two bytes before it
_MAX_LINE = 10_000_000  # bytes of the log
# Settings that may differ when a run is resumed: they do not change what is learned (accumulate: but for dropout).
FREE = (
    "data",
    "accumulate",
    "recompute",
    "bad_samples",
    "save_minutes",
    "log_steps",
    "overlays",
    "tensorboard",
    "workers",
    "eval_freq",
    "val_split",
)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Replaces a checkpoint by `state`, plain types and tensors, and waits until it is on the disk."""

    def write(file: BinaryIO) -> None:
        summed = _Summed(file)
        torch.save({"schema": SCHEMA, **state}, summed)
        file.seek(-len(_LENGTH), os.SEEK_END)
        file.write(_LENGTH + _MARK + summed.digest.hexdigest().encode())

    write_atomically(path, write)


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that `recipe` (as a dictionary) goes on from.

    Raises:
        CheckpointError: it cannot be read, is damaged, or was made with other settings; the message names them.
    """
    try:
        with open_regular(path) as file:
            schema = _checked_schema(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("schema") != schema or not isinstance(state.get("recipe"), dict):
            raise ValueError("not written by this version of segmenter")
        then = state["recipe"]
    except Exception as error:  # torch raises four kinds of errors for damaged files
        raise CheckpointError(
            f"{path}: training cannot go on from it ({cause(error)}); start in another folder"
        ) from error
    usual = Recipe("").to_dict()  # a setting that did not exist then is as it always was
    names = sorted({*then, *recipe} - set(FREE))
    before, now = ({name: settings.get(name, usual.get(name)) for name in names} for settings in (then, recipe))
    if other := [name for name in names if before[name] != now[name]]:
        differences = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in other)
        raise CheckpointError(f"{path}: was trained with other settings ({differences}); start in another folder")
    return state


@contextlib.contextmanager
def writing_run(directory: Path) -> Iterator[None]:
    """Makes the folder of a run, keeps other runs out of it, and deletes what one that was killed left half-written.

    Raises:
        OSError: it cannot be made, or another run goes on in it.
    """
    with writing_into(directory):
        for part in (BEST, FINAL, OVERLAYS):
            remove_leftovers(directory / part)
        yield


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(path, text)


class Log:
    """log.jsonl, and TensorBoard's files if asked for.

    Args:
        step: where the run starts; what a run that was killed wrote beyond it is removed.
    """

    def __init__(self, directory: Path, step: int, tensorboard: bool):
        self.path = directory / LOG
        kept = b"".join(_lines_up_to(self.path, step)) if self.path.exists() else b""
        write_atomically(self.path, lambda file: file.write(kept))
        self._writer = _tensorboard(directory, step) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line; numbers go to TensorBoard as well."""
        append(self.path, json.dumps(_plain({"step": step, **values}), allow_nan=False).encode() + b"\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _plain(value: Any) -> Any:
    """JSON knows no NaN, the score of a class that is not there, and no infinity."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    """The lines of a log, of steps up to `step`; one that was cut off by a kill is none."""
    with open_regular(path) as file:
        while line := file.readline(_MAX_LINE):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith(b"\n") and parse_json(line)["step"] <= step:
                    yield line


class _Summed:
    """A file to write to, and the sum of what is written."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _checked_schema(file: BinaryIO) -> int:
    """The schema of a checkpoint whose sums are right. Raises ValueError, or what zipfile raises, if they are not."""
    content = file.seek(0, os.SEEK_END) - _COMMENT - len(_LENGTH)
    file.seek(max(content, 0))
    end = file.read()
    if not end.startswith(_LENGTH + _MARK):
        if bad := zipfile.ZipFile(file).testzip():
            raise ValueError(f"damaged, {bad} fails its checksum")
        return 1
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(min(1 << 20, content - file.tell())):
        digest.update(block)
    digest.update(bytes(len(_LENGTH)))  # torch wrote no comment
    if end[len(_LENGTH) + len(_MARK) :] != digest.hexdigest().encode():
        raise ValueError("damaged, its sha256 is another than when it was written")
    return SCHEMA


def _tensorboard(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(f"tensorboard is not installed: pip install 'segmenter-triton[train]' ({error})") from error

    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
