"""Device, model and class names for the commands that need them; what goes wrong ends in a CommandError."""

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from segmenter.classes import ClassesError, ClassSet, generic_classes, load_classes
from segmenter.cli.errors import CHECKPOINT, DEVICE, CommandError
from segmenter.cli.output import err
from segmenter.config import ConfigError
from segmenter.eomt import Eomt, is_eomt, load_eomt
from segmenter.model import Segmenter
from segmenter.ops import ImplementationError
from segmenter.weights.load import load_any
from segmenter.weights.read import CheckpointError

WEIGHTS_WARNING = {
    "random": "RANDOM WEIGHTS: the labels and maps mean nothing; give a trained checkpoint to --model",
    "encoder": "RANDOM DECODER: only the encoder is trained, the labels mean nothing; train it or use another model",
}
LOADING = {  # arguments of `load_any` that are options here -> what they are unless given
    "n_cls": None,
    "hub": False,
    "averaged": None,
    "allow_pickle": False,
    "allow_nonfinite": False,
    "verify": True,
}
_FLAGS = {  # what messages of the library call an argument -> its name here
    "allow_pickle=True": "--allow-pickle",
    "allow_nonfinite=True": "--allow-nonfinite",
    "verify=False": "--no-verify",
    "hub=True": "--hub",
    "give n_cls": "give --n-cls",
    "give n_heads": "give --n-heads",
    "give its grid": "give its --grid",
    "averaged=True": "--averaged",
    "averaged=False": "--no-averaged",
}


def choose_device(name: str) -> torch.device:
    """The device called `name`, tried out; "auto" is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # RuntimeError, AssertionError or NotImplementedError, depending on how torch was built
        reason = str(error).strip().split("\n")[0]
        raise CommandError(f"device {name!r} cannot be used here: {reason}", DEVICE) from error
    return device


def load(args: argparse.Namespace, device: torch.device, quiet: bool = False) -> Segmenter:
    """The model of --model, with a loud warning unless its weights are trained (or another process gives it)."""
    with errors_of_loading():
        model = load_any(args.model, impl=args.impl, device=device, **loading_options(args))
    if not quiet:
        warn_unless_trained(model.info.weights)
    return model


def load_for_labels(args: argparse.Namespace, device: torch.device, quiet: bool = False) -> Segmenter | Eomt:
    """As `load`, of any model that makes labels of images: a folder of EoMT too."""
    if not is_eomt(args.model):
        return load(args, device, quiet)
    if given := [name for name, usual in LOADING.items() if getattr(args, name) != usual]:
        flags = ", ".join("--" + ("no-verify" if name == "verify" else name.replace("_", "-")) for name in given)
        raise CommandError(f"{args.model}: is EoMT, which has no {flags}")
    with errors_of_loading():
        return load_eomt(args.model, impl=args.impl, device=device)


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for the functions of `segmenter.weights.load`."""
    return {name: getattr(args, name) for name in LOADING}


def warn_unless_trained(weights: str) -> None:
    """Says on stderr that results of random weights mean nothing; `weights` is `ModelInfo.weights`."""
    if weights in WEIGHTS_WARNING:
        err(f"segmenter: WARNING: {WEIGHTS_WARNING[weights]}")


@contextlib.contextmanager
def errors_of_loading() -> Iterator[None]:
    """Turns what loading raises into a CommandError that speaks of command line options."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        message = str(error)
        for argument, flag in _FLAGS.items():
            message = message.replace(argument, flag)
        raise CommandError(message, CHECKPOINT) from error
    except (ImplementationError, torch.OutOfMemoryError) as error:
        raise CommandError(str(error), DEVICE) from error


def choose_classes(asked: str | None, model: Segmenter | Eomt) -> ClassSet:
    """Names and colours that `asked` (--classes) or else the model names; generated ones if there are none that fit."""
    if asked is None and isinstance(model, Eomt):
        return model.classes
    key = asked or model.info.classes
    if key is None:
        return generic_classes(model.n_cls)
    try:
        classes = load_classes(key)
        if len(classes) != model.n_cls:
            raise ClassesError(f"{key} names {len(classes)} classes, the model has {model.n_cls}")
        return classes
    except ClassesError as error:
        if asked:
            raise CommandError(str(error)) from error
        warnings.warn(f"{error}; colours are generated instead", stacklevel=2)
        return generic_classes(model.n_cls)
