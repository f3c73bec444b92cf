"""Reads the variant.yml beside a published checkpoint, without letting it name Python objects."""

import os
from typing import Any

from segmenter.text_files import read_yaml
from segmenter.weights.read import CheckpointError


def read_variant(path: str | os.PathLike) -> dict[str, Any]:
    """The whole file as plain types; `net_kwargs` is a mapping in it.

    Numbers without a dot such as 1e-5 come as text (YAML 1.1); `ModelConfig.from_dict` reads them.

    Raises:
        CheckpointError: what `read_yaml` refuses, or no `net_kwargs`.
    """
    variant = read_yaml(path, CheckpointError, tuples=True)
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise CheckpointError(f"{path}: has no net_kwargs; it must be the variant.yml that training wrote")
    return variant
