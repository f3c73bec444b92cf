"""Arguments of `segmenter figures`."""

import argparse

from segmenter.cli.argument_types import checked, coordinate, numbers, positive_int, some_of

NAMES = (
    "patch-size",
    "attention-by-layer",
    "field-of-view",
    "class-embeddings",
    "distance-by-depth",
    "qualitative",
)
DESCRIPTION = (
    "Draws what a model sees in an image as figures for print: NAME.pdf, NAME.png (170 mm wide, 300 dots an inch) and "
    f"the numbers in it, NAME.json. NAME is {', '.join(NAMES)}. A figure that needs more than is given is left out, "
    "which is said, unless it is named by --only."
)


def add_figures(parser: argparse.ArgumentParser) -> None:
    """All but the image, the model, the output folder, the device and the compute type."""
    parser.add_argument(
        "--only", type=some_of(NAMES), metavar="NAME[,NAME]", help="these figures (default: all that can be)"
    )
    parser.add_argument("--classes", metavar="KEY_OR_FILE", help="names and colours, as for predict")
    parser.add_argument(
        "--size", type=positive_int, metavar="PIXELS", help="bring short sides to this to look at attention"
    )
    where = parser.add_argument_group("where to look from, pixels of IMAGE (default: a large and a small object)")
    pair = {"nargs": 2, "type": coordinate, "metavar": ("X", "Y")}
    where.add_argument("--point", action="append", **pair, help="for attention-by-layer, several times if need be")
    where.add_argument("--large", **pair, help="a point on a large object, for field-of-view")
    where.add_argument("--small", **pair, help="and one on a small one")
    text = "for attention-by-layer (default: first, middle, last); field-of-view takes the last of them"
    where.add_argument("--layer", type=numbers(), metavar="L[,L]", help=text)
    text = "a class by id or name for class-embeddings, several times if need be (default: the three largest)"
    where.add_argument("--class", dest="chosen", action="append", metavar="CLASS", help=text)
    beside = parser.add_argument_group("what to show beside")
    text = "models for patch-size, as for --model, usually of patch 32, 16 and 8"
    beside.add_argument("--models", nargs="+", default=(), metavar="M", help=text)
    text = "folder of images (with sub-folders) for distance-by-depth (default: IMAGE alone)"
    beside.add_argument("--images", metavar="DIR", help=text)
    text = "another model's label files for qualitative: of street.jpg street.png or street_labels.png; twice at most"
    beside.add_argument("--other", action="append", type=_named, metavar="NAME=DIR", help=text)
    text = "folder of true label files, for qualitative and patch-size: values are class ids, 255 does not count"
    beside.add_argument("--truth", metavar="DIR", help=text)
    text = "the images of qualitative, a row each (default: IMAGE)"
    beside.add_argument("--rows", nargs="+", metavar="FILE", help=text)


def _name_and_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ValueError
    return name, folder


_named = checked(_name_and_folder, "a name and a folder such as UperNet=labels")
