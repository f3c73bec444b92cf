"""Class names and colours."""

from pathlib import Path

from segmenter import classes

PASCAL_CONTEXT_CATS_PATH = Path(classes.__file__).with_name("pascal_context.yml")
