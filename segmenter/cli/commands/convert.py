"""`segmenter convert`: weights of any known kind to our folder format."""

import argparse
import os

import torch

from segmenter.classes import ClassesError
from segmenter.cli.errors import OK, CommandError
from segmenter.cli.loading import errors_of_loading, loading_options, warn_unless_trained
from segmenter.cli.output import out
from segmenter.weights.load import convert_checkpoint


def run(args: argparse.Namespace) -> int:
    if os.path.isfile(args.output):
        raise CommandError(f"{args.output}: is a file; give a folder")
    if args.keep and not args.int8:
        raise CommandError("--keep says what --int8 leaves as float16; give --int8, too")
    request = {name: getattr(args, name) for name in ("decoder", "image_size", "patch_size", "grid", "n_heads")}
    dtype = torch.float16 if args.half else torch.int8 if args.int8 else None
    options = loading_options(args)
    with errors_of_loading():
        try:
            report = convert_checkpoint(
                args.source, args.output, dtype=dtype, keep=args.keep, classes=args.classes, **options, **request
            )
        except ClassesError as error:
            raise CommandError(str(error)) from error
    out(*str(report).splitlines())
    warn_unless_trained(report.weights)
    return OK
