"""`segmenter push`: a model folder to the Hugging Face hub."""

import argparse

from segmenter.cli.errors import OK
from segmenter.cli.loading import errors_of_loading
from segmenter.cli.output import out
from segmenter.weights.hub import push_to_hub


def run(args: argparse.Namespace) -> int:
    with errors_of_loading():
        url = push_to_hub(args.folder, args.repo, private=args.private, license=args.license, message=args.message)
    out(f"{args.folder} -> {url}")
    return OK
