"""`segmenter export`: a model as a file that labels images without this package."""

import argparse

from segmenter.cli.errors import FAILURE, OK, CommandError
from segmenter.cli.loading import choose_device, load
from segmenter.cli.output import err, out
from segmenter.errors import cause
from segmenter.export.check import ExportError, export_model
from segmenter.export.formats import check_path


def run(args: argparse.Namespace) -> int:
    try:
        check_path(args.output, args.format)  # before the model is loaded, which may take long
    except (ValueError, OSError) as error:
        raise CommandError(_said(error)) from error
    model = load(args, choose_device(args.device))
    request = {"output": args.output_kind, "dtype": args.dtype, "check_sizes": args.check_sizes}
    try:
        report = export_model(model, args.output, args.format, progress=_say, **request)
    except ExportError as error:
        raise CommandError(str(error), FAILURE) from error
    except ValueError as error:  # a size or type that this model or format does not have
        raise CommandError(str(error)) from error
    out(*str(report).splitlines(), f"  took     {report.seconds:.0f} s")
    return OK


def _say(text: str) -> None:
    err(f"segmenter: {text}")


def _said(error: Exception) -> str:
    return f"{error.filename}: {cause(error)}" if isinstance(error, OSError) else str(error)
