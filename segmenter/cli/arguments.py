"""Arguments of all commands. Imports nothing heavy, so that --help is instant."""

import argparse
from collections.abc import Callable

import segmenter

LABEL_KINDS = ("png", "raw", "npy")
EXPORT_FORMATS = ("torch", "onnx", "aoti")
EXPORT_OUTPUTS = ("labels", "logits", "masks")


def build_parser() -> argparse.ArgumentParser:
    """The parser; `command` in its result is the name of the module in segmenter.cli that has `run(args)`."""
    parser = argparse.ArgumentParser(
        prog="segmenter", description="Semantic segmentation with plain vision transformers."
    )
    parser.add_argument("--version", action="version", version=f"segmenter {segmenter.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_info, _add_predict, _add_convert, _add_export, _add_attention):
        add(commands).add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_info(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = "Versions, devices, and which implementation runs here and why; with --model, what the model is."
    parser = commands.add_parser("info", help="what runs here, what a model is", description=text)
    _add_model(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_predict(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Labels pictures. For each, writes NAME_overlay.png (class colours over the picture, with a legend), "
        "NAME_labels.png (pixel values are the labels) and NAME.json (share of each class). Files that cannot be read "
        "are reported at the end and listed in failed.json; the exit status is then 3. Started by "
        "torchrun, for several GPUs or machines, its processes share the pictures, go on after a restart, and make one "
        "report; the exit status is then 0, since torchrun takes any other for a lost process."
    )
    parser = commands.add_parser("predict", help="pictures to labels and overlays", description=text)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, folder (with sub-folders) or glob")
    _add_model(parser)
    parser.add_argument("-o", "--output", default="out", metavar="DIR", help="folder of the results (default: out)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip pictures already done, if picture, model, classes and options are still the same",
    )
    what = parser.add_argument_group("what to write")
    what.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True, help="the overlay picture")
    what.add_argument("--legend", action=argparse.BooleanOptionalAction, default=True, help="a legend beside it")
    what.add_argument("--alpha", type=_fraction, default=0.5, help="strength of its colours, 0..1 (default: 0.5)")
    what.add_argument(
        "--labels",
        type=_label_kinds,
        default=("png",),
        metavar="KIND[,KIND]",
        help="png: with palette (default); raw: grey png of 8 or 16 bits; npy; or none",
    )
    what.add_argument(
        "--classes",
        "--palette",
        metavar="KEY_OR_FILE",
        help="names and colours: ade20k, pascal_context, pascal_context_59, cityscapes, camvid, or a YAML or JSON file "
        "with a list of {id, name, color} (default: what the model says)",
    )
    how = parser.add_argument_group("how to run")
    _add_device(how)
    how.add_argument(
        "--dtype",
        choices=("float32", "auto", "bfloat16", "float16"),
        default="float32",
        help="compute type; auto: half precision where the processor gains from it (default: float32)",
    )
    how.add_argument("--window-size", type=_positive_int, metavar="PIXELS", help="(default: the model's)")
    how.add_argument(
        "--window-stride",
        type=_positive_int,
        metavar="PIXELS",
        help="(default: the model's, scaled with --window-size)",
    )
    how.add_argument(
        "--pictures",
        type=_positive_int,
        metavar="N",
        help="pictures of one size to run together (default: 1 on a CPU, else 8); halved when memory runs out",
    )
    how.add_argument(
        "--batch-size",
        type=_positive_int,
        metavar="N",
        help="windows a forward call (default: --pictures, but at least 8 if not on a CPU)",
    )
    how.add_argument(
        "--workers",
        type=_positive_int,
        metavar="N",
        help="threads that read pictures (default: one a processor, at most 4)",
    )
    how.add_argument(
        "--scales", type=_scales, default=(1.0,), metavar="S[,S]", help="average over these sizes (default: 1)"
    )
    how.add_argument("--flip", action="store_true", help="average with the mirrored picture too")
    return parser


def _add_convert(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Converts weights to a folder with model.safetensors and config.json. What they are is told by their content: "
        "published Segmenter checkpoints with variant.yml, mmsegmentation Segmenter, ViT and DeiT of timm, "
        "augreg .npz or Hugging Face."
    )
    parser = commands.add_parser("convert", help="any checkpoint to our folder format", description=text)
    parser.add_argument("source", metavar="SOURCE", help="checkpoint file or folder")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--half", action="store_true", help="store float16: half the size")
    parser.add_argument("--classes", metavar="KEY_OR_FILE", help="names and colours to store with the model")
    parser.add_argument("--decoder", choices=("linear", "mask_transformer"), help="to put on an encoder")
    parser.add_argument("--image-size", type=_positive_int, metavar="PIXELS", help="resample the position embedding")
    parser.add_argument("--patch-size", type=_positive_int, metavar="PIXELS", help="resample the patch embedding")
    _add_loading(parser)
    return parser


def _add_export(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Writes a model as a file that takes uint8 pixels (batch, height, width, 3) and gives labels, without this "
        "package; batch, height and width stay free. The file is loaded and compared with the model before it is put "
        "in place; if they disagree there is no file, and the exit status is 1."
    )
    parser = commands.add_parser("export", help="a model as torch.export, ONNX or AOTInductor file", description=text)
    _add_model(parser)
    parser.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        required=True,
        help="torch: torch.export (.pt2); onnx: ONNX (.onnx); aoti: machine code by AOTInductor (.pt2)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--output-kind",
        choices=EXPORT_OUTPUTS,
        default="labels",
        help="what the file computes: labels, scores at full size, or scores a patch (default: labels)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the network (default: that of the weights)",
    )
    parser.add_argument(
        "--check-sizes",
        type=_sizes,
        metavar="HxW,HxW[,HxW]",
        help="compare at these sizes (default: the window, an odd size, and another grid of as many patches)",
    )
    _add_device(parser)
    return parser


def _add_attention(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Writes attention maps as pictures: one a head, and a grid of all heads. They are of the top left square of "
        "the picture, resized from its short side to the model's image size."
    )
    parser = commands.add_parser("attention", help="attention maps as pictures", description=text)
    parser.add_argument("image", metavar="IMAGE")
    _add_model(parser)
    parser.add_argument("-o", "--output", default="out", metavar="DIR", help="folder of the results (default: out)")
    parser.add_argument("--part", choices=("encoder", "decoder"), default="encoder", help="(default: encoder)")
    parser.add_argument("--layer", type=_index_or_all, default="all", metavar="L|all", help="from 0 (default: all)")
    parser.add_argument("--head", type=_index_or_all, default="all", metavar="H|all", help="from 0 (default: all)")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument(
        "--cls",
        nargs="?",
        const="all",
        metavar="CLASS",
        help="attention of the class token (encoder), or of one class by id or name, or of all (decoder)",
    )
    query.add_argument(
        "--patch", nargs=2, type=_index, metavar=("X", "Y"), help="attention of the patch in column X, row Y, from 0"
    )
    _add_device(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("-m", "--model", required=required, metavar="M", help="model folder, checkpoint file or preset")
    parser.add_argument("--impl", choices=("auto", "eager", "triton"), default="auto", help="(default: auto)")
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    loading = parser.add_argument_group("loading of weights")
    loading.add_argument("--n-cls", type=_positive_int, metavar="N", help="classes, for weights that have no decoder")
    loading.add_argument("--hub", action="store_true", help="a model that is no path is one on the Hugging Face hub")
    loading.add_argument("--allow-pickle", action="store_true", help="I trust this file: let it run its code")
    loading.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinite weights")
    loading.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare checksums")


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")


def _checked(check: Callable[[str], object], wanted: str) -> Callable[[str], object]:
    """An argparse type whose error says what was wanted."""

    def parse(text: str) -> object:
        try:
            return check(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None

    return parse


def _number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _kinds(text: str) -> tuple[str, ...]:
    kinds = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    if not set(kinds) <= set(LABEL_KINDS):
        raise ValueError
    return kinds


def _hxw(text: str) -> tuple[tuple[int, int], ...]:
    sizes = tuple(tuple(map(_number(int, 1), size.split("x"))) for size in text.split(","))
    if len(sizes) < 2 or any(len(size) != 2 for size in sizes):
        raise ValueError
    return sizes


_index = _checked(_number(int, 0), "an integer from 0")
_positive_int = _checked(_number(int, 1), "an integer from 1")
_fraction = _checked(_number(float, 0, 1), "a number in 0..1")
_index_or_all = _checked(lambda text: text if text == "all" else _number(int, 0)(text), "an integer from 0, or all")
_scales = _checked(lambda text: tuple(map(_number(float, 0.01, 100), text.split(","))), "numbers such as 0.75,1,1.25")
_label_kinds = _checked(_kinds, f"none, or some of {', '.join(LABEL_KINDS)} with commas")
_sizes = _checked(_hxw, "two sizes or more such as 512x512,385x521")
