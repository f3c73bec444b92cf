"""Where the published code makes its loaders."""

from typing import Any, NoReturn

INSTEAD = (
    "of the published code needs mmcv and mmsegmentation and is not part of this project; `segmenter train` and "
    "`segmenter eval` read the same folders, in Python segmenter.data.datasets.open_dataset"
)


def create_dataset(dataset_kwargs: dict[str, Any]) -> NoReturn:
    """Raises ImportError: see `INSTEAD`."""
    raise ImportError(f"create_dataset {INSTEAD}")
