"""Class names and colours."""

from pathlib import Path

from segmenter import classes

ADE20K_CATS_PATH = Path(classes.__file__).with_name("ade20k.yml")
