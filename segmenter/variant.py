"""Reads the variant.yml beside a published checkpoint, without letting it name Python objects."""

import os
from pathlib import Path
from typing import Any

import yaml

from segmenter.checkpoint import CheckpointError

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain YAML and the one Python tag that the published training script writes, for `image_size`."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (`<<`) multiply without bound when nested and no published file has one: not expanded, refused."""


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))


def read_variant(path: str | os.PathLike) -> dict[str, Any]:
    """The whole file as plain types; `net_kwargs` is a mapping in it.

    Numbers without a dot such as 1e-5 come as text (YAML 1.1); `ModelConfig.from_dict` reads them.

    Raises:
        CheckpointError: missing, larger than 1 MB, not YAML, another Python tag, or no `net_kwargs`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_BYTES} bytes, which no variant.yml is")
        variant = yaml.load(text.decode("utf-8-sig"), Loader=_Loader)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply to be a variant.yml") from error
    except Exception as error:  # besides YAMLError: KeyError, IndexError, AttributeError for malformed scalars
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: is no plain YAML ({reason})") from error
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise CheckpointError(f"{path}: has no net_kwargs; it must be the variant.yml that training wrote")
    return variant
