"""Class names and colours."""

from pathlib import Path

from segmenter import classes

CITYSCAPES_CATS_PATH = Path(classes.__file__).with_name("cityscapes.yml")
