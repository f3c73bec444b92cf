"""Arguments of all commands. Imports nothing heavy, so that --help is instant."""

import argparse
import sys
from typing import Any

import segmenter
from segmenter.cli import figures_arguments
from segmenter.cli.argument_types import (
    fraction,
    im_size,
    label_kinds,
    one_size,
    positive_int,
    ratio,
    rows_columns,
    scales,
    sizes,
    words,
)
from segmenter.cli.attention_arguments import DESCRIPTION, add_attention
from segmenter.cli.train_arguments import DATA_KINDS, add_settings
from segmenter.errors import printable

EXPORT_FORMATS = ("torch", "onnx", "aoti")
EXPORT_OUTPUTS = ("labels", "logits", "masks")


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message or ""), file)  # it quotes what was given


def build_parser() -> argparse.ArgumentParser:
    """The parser; `command` in its result is the name of the module in segmenter.cli that has `run(args)`."""
    parser = _Parser(prog="segmenter", description="Semantic segmentation with plain vision transformers.")
    parser.add_argument("--version", action="version", version=f"segmenter {segmenter.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    using = _add_predict, _add_convert, _add_push, _add_export, _add_attention, _add_figures, _add_compare
    for add in (_add_info, *using, _add_eval, _add_train, _add_data):
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
        "Labels images. For each, writes NAME_overlay.png (class colours over the image, with a legend), "
        "NAME_labels.png (pixel values are the labels) and NAME.json (share of each class). Files that cannot be read "
        "are reported at the end and listed in failed.json; the exit status is then 3. Started by "
        "torchrun, for several GPUs or machines, its processes share the images, go on after a restart, and make one "
        "report; the exit status is then 0, since torchrun takes any other for a lost process."
    )
    parser = commands.add_parser("predict", help="images to labels and overlays", description=text)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder (with sub-folders) or glob")
    _add_model(parser)
    _add_output(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip images already done, if image, model, classes and options are still the same",
    )
    what = parser.add_argument_group("what to write")
    what.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True, help="the overlay image")
    what.add_argument("--legend", action=argparse.BooleanOptionalAction, default=True, help="a legend beside it")
    what.add_argument("--alpha", type=fraction, default=0.5, help="strength of its colours, 0..1 (default: 0.5)")
    what.add_argument(
        "--labels",
        type=label_kinds,
        default=("png",),
        metavar="KIND[,KIND]",
        help="png: with palette (default); raw: grey png of 8 or 16 bits; npy; or none",
    )
    what.add_argument(
        "--classes",
        "--palette",
        metavar="KEY_OR_FILE",
        help="names and colours: ade20k, cityscapes, voc2012 ... (segmenter.classes.CLASS_SETS), or a YAML or JSON "
        "file with a list of {id, name, color} (default: what the model says)",
    )
    how = parser.add_argument_group("how to run")
    _add_device(how)
    _add_dtype(how)
    _add_windows(how)
    how.add_argument(
        "--images",
        "--pictures",  # the older spelling
        type=positive_int,
        metavar="N",
        help="images of one size to run together (default: 1 on a CPU, else 8); halved when memory runs out",
    )
    how.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="windows a forward call (default: --images, but at least 8 if not on a CPU)",
    )
    how.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="threads that read images (default: one a processor, at most 4)",
    )
    _add_cuda_graphs(how)
    _add_scales(how)
    _add_flip(how)
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
    storage = parser.add_mutually_exclusive_group()
    storage.add_argument("--half", action="store_true", help="store float16: half the size")
    storage.add_argument("--int8", action="store_true", help="store int8 with a scale for each row: a quarter")
    parser.add_argument(
        "--keep", nargs="+", default=(), metavar="NAME", help="with --int8: weights that are stored as float16"
    )
    parser.add_argument("--classes", metavar="KEY_OR_FILE", help="names and colours to store with the model")
    parser.add_argument("--decoder", choices=("linear", "mask_transformer"), help="to put on an encoder")
    parser.add_argument(
        "--image-size", type=one_size, metavar="PIXELS|HxW", help="resample the position embedding to images of it"
    )
    parser.add_argument(
        "--grid", type=rows_columns, metavar="RxC", help="rows and columns of the position embedding in the file"
    )
    parser.add_argument("--n-heads", type=positive_int, metavar="N", help="of the encoder (default: width / 64)")
    parser.add_argument("--patch-size", type=positive_int, metavar="PIXELS", help="resample the patch embedding")
    _add_loading(parser)
    return parser


def _add_push(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Uploads a model folder to the Hugging Face hub in one commit: config.json, model.safetensors, classes.json if "
        "there is one, and a model card (the folder's README.md, or one that is made), but nothing else that lies "
        "there. The repository is made if need be. The token is that of `hf auth login`, or of the environment. "
        "--model NAME --hub reads it back."
    )
    parser = commands.add_parser("push", help="a model folder to the Hugging Face hub", description=text)
    parser.add_argument("folder", metavar="FOLDER", help="folder that convert or train has written")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--private", action="store_true", default=None, help="make it a private one")
    parser.add_argument("--license", metavar="ID", help="for the card, such as mit (default: the card says nothing)")
    parser.add_argument("--message", default="Upload a Segmenter model", metavar="TEXT", help="of the commit")
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
        type=sizes,
        metavar="HxW,HxW[,HxW]",
        help="compare at these sizes (default: the window, an odd size, and another grid of as many patches)",
    )
    _add_device(parser)
    return parser


def _add_attention(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("attention", help="where tokens attend to, as pictures", description=DESCRIPTION)
    parser.add_argument("image", metavar="IMAGE")
    _add_model(parser)
    _add_output(parser)
    add_attention(parser)
    how = parser.add_argument_group("how to run")
    _add_device(how)
    _add_dtype(how)
    text = "look within the sliding window of this size around each --point (default: the whole image at once)"
    how.add_argument("--window-size", type=positive_int, metavar="PIXELS", help=text)
    text = "(default: the model's, scaled with --window-size)"
    how.add_argument("--window-stride", type=positive_int, metavar="PIXELS", help=text)
    return parser


def _add_figures(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = figures_arguments.DESCRIPTION
    parser = commands.add_parser("figures", help="pictures for print of what a model sees", description=text)
    parser.add_argument("image", metavar="IMAGE")
    _add_model(parser)
    _add_output(parser)
    figures_arguments.add_figures(parser)
    how = parser.add_argument_group("how to run")
    _add_device(how)
    _add_dtype(how)
    return parser


def _add_compare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Draws the labels that several models give to one image, usually of patch 32, 16 and 8, side by side "
        "with the truth, and enlarged where they differ most along borders. Below each stand its boundary F, mIoU and "
        "time; all figures also go into a JSON file of the same name."
    )
    parser = commands.add_parser("compare", help="models side by side on one image", description=text)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image of your own")
    parser.add_argument("--truth", metavar="FILE", help="its labels: pixel values are class ids, 255 does not count")
    sample = parser.add_argument_group("a sample of a data set instead of IMAGE")
    _add_data_set(sample, required=False)
    sample.add_argument("--sample", metavar="NAME", help="name of the sample: its file, without extension")
    parser.add_argument(
        "-m", "--models", nargs="+", required=True, metavar="M", help="model folders, checkpoint files or presets"
    )
    parser.add_argument("--impl", choices=("auto", "eager", "triton"), default="auto", help="(default: auto)")
    _add_loading(parser)
    parser.add_argument(
        "-o", "--output", default="comparison.png", metavar="FILE", help="PNG to write (default: comparison.png)"
    )
    parser.add_argument("--classes", metavar="KEY_OR_FILE", help="names and colours, as for predict")
    how = parser.add_argument_group("how to run")
    _add_device(how)
    _add_dtype(how)
    _add_windows(how)
    how.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="timed runs (default: 5)")
    return parser


def _add_train(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Trains a model, by default as published (SGD, poly 0.9, stochastic depth 0.1). Settings come from a YAML "
        "recipe, from flags, or both (flags win). The output folder holds the checkpoint that the same command goes on "
        "from after any kind of end, the best and the final model, and the log. SIGTERM, or Ctrl-C, ends the step "
        "under way and saves; the exit status is then 143. Started by torchrun, its processes share each batch."
    )
    parser = commands.add_parser("train", help="train on a data set", description=text)
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of settings, named as the flags with _ for -")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the run")
    _add_device(parser)
    add_settings(parser)
    return parser


def _add_eval(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = (
        "Scores of a model on a data set: mIoU, mAcc, aAcc, boundary F and boundary IoU, in all and for each class. "
        "Writes scores.json, scores.yml, per_class.png (a chart), and what was counted of each image (records/), "
        "from which --resume goes on. Started by torchrun, its processes share the images and give exactly the same "
        "scores; see predict about restarts and the exit status."
    )
    parser = commands.add_parser("eval", help="scores on a data set", description=text)
    _add_data_set(parser, required=True)
    _add_model(parser)
    _add_output(parser)
    parser.add_argument(
        "--resume", action="store_true", help="keep what is recorded, if settings and files are still the same"
    )
    parser.add_argument(
        "--bad-samples",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about files that cannot be used; those skipped are listed in failed.json, and the exit status "
        "is 3 (default: stop)",
    )
    what = parser.add_argument_group("what to write")
    what.add_argument("--boundary", action=argparse.BooleanOptionalAction, default=True, help="the boundary scores")
    what.add_argument("--chart", action=argparse.BooleanOptionalAction, default=True, help="per_class.png")
    what.add_argument(
        "--overlays",
        type=positive_int,
        nargs="?",
        const=sys.maxsize,
        metavar="N",
        help="overlays/NAME.png: image, truth and prediction of N samples, evenly spread, or of all",
    )
    how = parser.add_argument_group("how to run")
    _add_device(how)
    _add_dtype(how)
    how.add_argument(
        "--im-size",
        type=im_size,
        metavar="PIXELS|own",
        help="resize the short side to this, or do not resize (default: as published for the data set, else own)",
    )
    how.add_argument(
        "--max-ratio",
        type=ratio,
        metavar="R",
        help="the long side gets at most R times --im-size (default: as published, else 4)",
    )
    _add_windows(
        how, "as published, the window less 32, for ADE20K, Pascal Context and Cityscapes; for others the model's"
    )
    how.add_argument("--batch-size", type=positive_int, metavar="N", help="windows a forward call (default: 1 or 8)")
    how.add_argument("--workers", type=positive_int, metavar="N", help="threads that read and count (default: 1 to 4)")
    _add_cuda_graphs(how)
    scales = how.add_mutually_exclusive_group()
    _add_scales(scales)
    scales.add_argument(
        "--multiscale", action="store_true", help="as published: 0.5,0.75,1,1.25,1.5,1.75, each also mirrored"
    )
    _add_flip(how)
    return parser


def _add_data(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("data", help="check a data set", description="Data sets.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = (
        "Reads every image and label of a data set: one of the public ones that --kind names, or a folder of your "
        "own with images/, annotations/ and dataset.yml. Reports sizes, the share of each class, images that are the "
        "same in several splits, and every file that cannot be used; if there are any, the exit status is 3."
    )
    check = actions.add_parser("check", help="what is in a data set, and what is wrong with it", description=text)
    check.add_argument("root", metavar="DIR")
    check.add_argument(
        "--kind",
        metavar="KIND",
        help=f"{DATA_KINDS} (default: told by its folders)",
    )
    check.add_argument("--split", type=words, metavar="S[,S]", help="such as train,val (default: all that are there)")
    check.add_argument("--classes", metavar="KEY_OR_FILE", help="other names and colours, as for predict")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--workers", type=positive_int, metavar="N", help="threads that read (default: one a processor, at most 4)"
    )
    return check


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("-m", "--model", required=required, metavar="M", help="model folder, checkpoint file or preset")
    parser.add_argument("--impl", choices=("auto", "eager", "triton"), default="auto", help="(default: auto)")
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    loading = parser.add_argument_group("loading of weights")
    loading.add_argument("--n-cls", type=positive_int, metavar="N", help="classes, for weights that have no decoder")
    loading.add_argument("--hub", action="store_true", help="a model that is no path is one on the Hugging Face hub")
    loading.add_argument(
        "--averaged",
        action=argparse.BooleanOptionalAction,
        help="take the averaged (EMA) weights, or the plain ones, of a training checkpoint that holds both",
    )
    loading.add_argument("--allow-pickle", action="store_true", help="I trust this file: let it run its code")
    loading.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinite weights")
    loading.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare checksums")


def _add_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "auto", "bfloat16", "float16"),
        default="float32",
        help="compute type; auto: half precision where the processor gains from it (default: float32)",
    )


def _add_cuda_graphs(parser: argparse._ActionsContainer) -> None:
    text = "on a GPU, run batches of windows that come again as CUDA graphs; same labels (default: yes)"
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help=text)


def _add_windows(parser: argparse._ActionsContainer, stride: str = "the model's") -> None:
    parser.add_argument("--window-size", type=positive_int, metavar="PIXELS", help="(default: the model's)")
    text = f"(default: {stride}, scaled with --window-size)"
    parser.add_argument("--window-stride", type=positive_int, metavar="PIXELS", help=text)


def _add_scales(parser: argparse._ActionsContainer) -> None:
    text = "average over these sizes (default: 1)"
    parser.add_argument("--scales", type=scales, default=(1.0,), metavar="S[,S]", help=text)


def _add_flip(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image too")


def _add_output(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("-o", "--output", default="out", metavar="DIR", help="folder of the results (default: out)")


def _add_data_set(parser: argparse._ActionsContainer, required: bool) -> None:
    text = "folder of the data set; see data check"
    parser.add_argument("-d", "--data", required=required, metavar="DIR", help=text)
    parser.add_argument("--kind", metavar="KIND", help="ade20k, cityscapes ... (default: told by its folders)")
    parser.add_argument("--split", default="val", help="(default: val)")


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
