"""EoMT from a local folder of Hugging Face. Nothing is downloaded, and no code of the folder runs."""

import os
from pathlib import Path
from typing import Any

import torch

from segmenter.classes import CLASS_SETS, ClassSet, generic_classes, load_classes
from segmenter.eomt.model import Eomt
from segmenter.errors import cause, printable
from segmenter.text_files import read_json
from segmenter.weights.read import CheckpointError

NETWORKS = {
    "eomt": "EomtForUniversalSegmentation",
    "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
}
INSTALL = "pip install -U 'transformers>=5' torchvision scipy"


def is_eomt(source: Any) -> bool:
    """Whether this is a folder with a config.json of EoMT. Says nothing about whether it can be loaded."""
    try:
        return _model_type(Path(source)) in NETWORKS
    except (CheckpointError, TypeError, ValueError):
        return False


def load_eomt(folder: str | os.PathLike, *, impl: str = "auto", device: str | torch.device | None = None) -> Eomt:
    """Loads EoMT, offline and from safetensors alone; it is in evaluation mode, its network on the kernels.

    Args:
        folder: with config.json (model type "eomt" or "eomt_dinov3"), preprocessor_config.json and model.safetensors,
            as `save_pretrained` of transformers writes and its hub has.
        impl: "eager", "triton" or "auto". device: where the model goes, by default the CPU. Kernels are put into the
            network for this device; after moving it elsewhere call `model.accelerate()`.
    Raises:
        CheckpointError: the folder cannot be used, or transformers, torchvision or scipy (which its EoMT needs) is
            missing. ImplementationError: impl cannot run.
    """
    folder = Path(folder)
    kind = _model_type(folder)
    if kind not in NETWORKS:
        raise CheckpointError(f"{folder}: its model type is {kind!r:.80}, not one of {', '.join(NETWORKS)}")
    if not os.path.isfile(folder / "preprocessor_config.json"):
        raise CheckpointError(
            f"{folder}: has no preprocessor_config.json, which says how images are cut; copy it there"
        )
    if not (os.path.isfile(folder / "model.safetensors") or os.path.isfile(folder / "model.safetensors.index.json")):
        raise CheckpointError(f"{folder}: has no model.safetensors; pickled weights are not read")
    try:
        import transformers

        network_class, processor_class = (getattr(transformers, n) for n in (NETWORKS[kind], "EomtImageProcessor"))
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        network, found = network_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{folder}: EoMT needs transformers 5 ({cause(error)}): {INSTALL}") from error
    except Exception as error:  # whatever a damaged folder makes it raise
        raise CheckpointError(f"{folder}: transformers cannot load it ({cause(error)})") from error
    if missing := sorted(
        {*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])} - {"attn_mask_probs"}
    ):
        raise CheckpointError(f"{folder}: weights are missing or of another shape: {', '.join(missing[:3])}")
    source = printable("/".join(folder.absolute().parts[-2:])) + f" ({kind})"
    try:
        model = Eomt(network.eval(), processor, classes_of(network.config), source, impl).eval()
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return (model if device is None else model.to(device)).accelerate()


def classes_of(config: Any) -> ClassSet:
    """Names and colours of a configuration's classes: of a known data set if they have its names, else generated."""
    names = tuple(str(config.id2label.get(i, f"class {i}")) for i in range(config.num_labels))
    for key in CLASS_SETS:
        known = load_classes(key)
        if [_first(name) for name in known.names] == [_first(name) for name in names]:
            return known
    generated = generic_classes(config.num_labels)
    if names[0].startswith("LABEL_"):  # transformers' own for classes that nobody has named
        return generated
    return ClassSet(generated.name, names, generated.palette)


def _model_type(folder: Path) -> Any:
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / "config.json", CheckpointError)
    return config.get("model_type") if isinstance(config, dict) else None


def _first(name: str) -> str:
    """The first of several names for one class, without capitals."""
    return name.replace(";", ",").split(",")[0].strip().lower()
