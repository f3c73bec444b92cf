"""What --resume compares: the image, the model, the class names, and the options of the run that wrote a result."""

import argparse
import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from segmenter.classes import ClassSet
from segmenter.eomt import Eomt
from segmenter.errors import InputError
from segmenter.model import Segmenter
from segmenter.text_files import read_json

_MAX_RESULT = 10_000_000  # bytes: of thousands of classes
_OPTIONS = ("overlay", "legend", "alpha", "labels", "dtype", "window_size", "window_stride", "scales", "flip", "model")


def run_settings(args: argparse.Namespace, model: Segmenter | Eomt, classes: ClassSet) -> dict[str, Any]:
    """All that the results depend on besides the image, as it reads back from JSON."""
    settings = {name: getattr(args, name) for name in _OPTIONS}
    settings |= {
        "classes": classes.name,
        "n_cls": model.n_cls,
        "weights": model.info.weights,
        "impl": model.impl,
        "model_crc32": model_fingerprint(model),
        "classes_crc32": f"{zlib.crc32(json.dumps(dataclasses.astuple(classes)).encode()):08x}",
    }
    return json.loads(json.dumps(settings))


def model_fingerprint(model: Segmenter | Eomt) -> str:
    """CRC-32, in hex, of configuration, information and the bytes of every tensor: other weights, another one."""
    crc = zlib.crc32(repr((model.config, model.info)).encode(errors="surrogateescape"))
    for tensor in model.state_dict().values():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
        crc = zlib.crc32(data.numpy(), crc)
    return f"{crc:08x}"


def image_facts(path: Path) -> dict[str, int] | None:
    """Size in bytes and time of the last change, or None: no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def is_done(json_file: Path, source: Path, settings: dict[str, Any]) -> bool:
    """Whether `json_file` tells of this image as it is now, with these settings, and all its files are there."""
    facts = image_facts(source)
    try:
        result = read_json(json_file, InputError, _MAX_RESULT)
        then = (result["image"], result["picture"], result["settings"])
        same = facts is not None and then == (str(source), facts, settings)
        return same and all((json_file.parent / Path(file).name).is_file() for file in result["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
