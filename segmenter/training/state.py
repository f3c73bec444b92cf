"""A training run on the disk: what it is resumed from, its log, and the models it leaves.

    checkpoint.pth   everything the next step follows from; its "model" is read by `load_model` too (the weights as
                     they are trained; best/ and final/ hold their average, if there is one)
    variant.yml      what the published code reads beside a checkpoint.pth
    recipe.yml       the settings
    log.jsonl        a JSON line each few steps, and each evaluation
    best/, final/    models: the best on val so far, and that after the last step
    overlays/        pictures of val as the model labels them

Each file but the log is written under another name and renamed, so a kill at any time loses the steps since the last
save and nothing else. No random state is saved: dropout follows from (seed, step, process), samples from (seed, epoch,
sample).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml

from segmenter.checkpoint import CheckpointError
from segmenter.files import remove_leftovers as _remove_leftovers
from segmenter.files import write_atomically, write_text
from segmenter.training.recipe import RecipeError

CHECKPOINT, VARIANT, RECIPE, LOG = "checkpoint.pth", "variant.yml", "recipe.yml", "log.jsonl"
BEST, FINAL, OVERLAYS = "best", "final", "overlays"
SCHEMA = 1
# Settings that may differ when a run is resumed: they do not change what is learned.
FREE = (
    "data",
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
    write_atomically(path, lambda file: torch.save({"schema": SCHEMA, **state}, file))


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that `recipe` (as a dictionary) goes on from.

    Raises:
        CheckpointError: it cannot be read, or was made with other settings; the message names them.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("schema") != SCHEMA:
            raise ValueError("not written by this version of segmenter")
        then = state["recipe"]
    except Exception as error:  # torch raises four kinds of errors for damaged files
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: training cannot go on from it ({cause}); start in another folder") from error
    names = sorted({*then, *recipe} - set(FREE))
    if other := [name for name in names if then.get(name) != recipe.get(name)]:
        differences = ", ".join(f"{name} {then.get(name)!r} -> {recipe.get(name)!r}" for name in other)
        raise CheckpointError(f"{path}: was trained with other settings ({differences}); start in another folder")
    return state


def remove_leftovers(folder: Path) -> None:
    """Deletes half-written files of a run that was killed."""
    for part in (folder, folder / BEST, folder / FINAL, folder / OVERLAYS):
        _remove_leftovers(part)


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(path, text)


class Log:
    """log.jsonl, and TensorBoard's files if asked for.

    Args:
        step: where the run starts; what a run that was killed wrote beyond it is removed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.path = folder / LOG
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._writer = _tensorboard(folder, step) if tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line; numbers go to TensorBoard as well."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain({"step": step, **values}), allow_nan=False) + "\n")
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


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that was cut off by a kill
        return float("inf")


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(f"tensorboard is not installed: pip install 'segmenter-triton[train]' ({error})") from error

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
