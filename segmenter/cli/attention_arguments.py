"""Arguments of `segmenter attention`."""

import argparse

from segmenter.cli.argument_types import coordinate, fraction, index, numbers, positive_int

DESCRIPTION = (
    "Draws where tokens attend to, over the whole image: those of points (--point), of classes (--class), or else the "
    "class token's; in the decoder the class tokens'. Writes PART_layerL/QUERY/, in it mean.png (all heads) or a "
    "picture for each head and a grid of them; with --rollout PART_rolloutL/QUERY.png. Memory grows with the number of "
    "patches, not with its square. --square draws as the published script does: the top left square of the image, "
    "resized from its short side to the model's image size."
)
VIEWS = ("overlay", "heat")


def add_attention(parser: argparse.ArgumentParser) -> None:
    """All but the model, the output folder, the device and windows."""
    parser.add_argument("--part", choices=("encoder", "decoder"), default="encoder", help="(default: encoder)")
    text = "from 0, with commas (default: all; of a rollout the last)"
    parser.add_argument("--layer", type=numbers("all"), metavar="L[,L]|all", help=text)
    text = "from 0, with commas (default: mean, with --square all)"
    parser.add_argument("--head", type=numbers("all", "mean"), metavar="H[,H]|all|mean", help=text)
    where = parser.add_argument_group("where to look from; the first two may be given several times")
    text = "the patch that holds this pixel of the image: column and row, from 0"
    where.add_argument("--point", nargs=2, type=coordinate, action="append", metavar=("X", "Y"), help=text)
    text = "a class by id or name: in the encoder the mean over its patches, in the decoder its token"
    where.add_argument("--class", dest="classes", action="append", metavar="CLASS", help=text)
    one = where.add_mutually_exclusive_group()
    text = "the class token (encoder), or the token of one class by id or name, or of all (decoder)"
    one.add_argument("--cls", nargs="?", const="all", metavar="CLASS", help=text)
    text = "with --square: the patch in column X, row Y, from 0"
    one.add_argument("--patch", nargs=2, type=index, metavar=("X", "Y"), help=text)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--rollout", action="store_true", help="attention rollout from each layer down to the first")
    text = "colours over the image, or one colour a patch alone (default: overlay)"
    what.add_argument("--view", choices=VIEWS, default="overlay", help=text)
    what.add_argument("--alpha", type=fraction, default=0.6, help="strength of the colours, 0..1 (default: 0.6)")
    what.add_argument("--npz", action="store_true", help="write the numbers too: attention.npz")
    what.add_argument("--square", action="store_true", help="the published square crop; needs --cls or --patch")
    what.add_argument(
        "--size", type=positive_int, metavar="PIXELS", help="bring the short side of the image to this first"
    )
