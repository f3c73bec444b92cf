"""The files that `tests.fuzz` mutates: how a valid one is made and read, and what may come of it."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from segmenter.classes import ClassesError, generic_classes, load_classes
from segmenter.config import ConfigError
from segmenter.data.datasets import open_dataset
from segmenter.data.label_files import DataError, read_ids
from segmenter.inference.images import ImageError, read_image
from segmenter.training import checkpoint as training_state
from segmenter.training.recipe import Recipe, RecipeError, read_recipe
from segmenter.weights.load import load_model
from segmenter.weights.pretrained import from_pretrained
from segmenter.weights.read import CheckpointError, read_state_dict
from segmenter.weights.settings import as_published
from tests.fuzz import Format
from tests.support.data_sets import make_data_set, rectangles, smooth_noise
from tests.support.tiny import tiny_model

PICKLE = (
    b".", b"(", b")", b"}", b"]", b"0", b"2", b"h\x00", b"q\x00", b"\x80\x02", b"\x80\x05", b"\x85", b"\x86", b"R",
    b"b", b"t", b"Q", b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ccollections\nOrderedDict\n",
    b"X\xff\xff\xff\x7f", b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", b"K\xff", b"N", b"\x88",
    b"\x93", b"\x94", b"\x95"+b"\xff" * 8, b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"F1e999\n", b"I99999999999999999999\n", b"V\\ud800\n",
)  # fmt: skip
YAML = (
    b"&a ", b"*a", b"[*a, *a, *a, *a]", b"<<: ", b"<<: *a", b"? ", b"? [[1]]\n: 2\n",
    b"!!python/object/apply:os.system [id]", b"!!python/tuple [1, 2]", b"!!python/tuple ", b"!!binary ",
    b"!!timestamp ", b"2020-13-99", b"!!set {a}", b"!!omap [a: 1]", b"---\n", b"...\n", b"%YAML 9.9\n", b"[", b"{",
    b"]", b"}", b"- ", b": ", b"\n", b"\t", b"  ", b"|\n", b">\n", b"'", b'"', b"~", b"null", b"true", b"no", b".nan",
    b".inf", b"0x_", b"0b_", b"1:60:60", b"1_000", b"08", b"\\xZZ", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\x1b[31m", "\u2028".encode(), b"[" * 70, b"{a: " * 70,
)  # fmt: skip
JSON = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b"1e999",
    b"\\ud800", b'"\\ud800"', b'"\\u0000"', b'"\\u001b[31m"', b"{}", b"[]", b'""', b"[" * 70, b'{"a":' * 70,
    b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"-", b"0.5", b'"a": 1, ',
)  # fmt: skip
NAMES = (
    b"\n", b"\r\n", b"\r", b"\x00", b"../", b"/", b"./", b" ", b"\t", b"..", b"/etc/passwd", b"train_1", b"\xff",
    b"\xef\xbb\xbf", b"\xff\xfe", b"train_0.png", b"#", b"\x1b[31m", b"a" * 300, "e\u0301".encode(),
    "\u2028".encode(),
)  # fmt: skip
CHUNKS = (
    b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"\xff\xd8", b"\xff\xda",
    b"\xff\xc0", b"\xff\xdb", b"\xff\xe1", b"RIFF", b"VP8 ", b"VP8L", b"VP8X", b"ANMF", b"GIF89a", b"\x21\xf9",
    b"\x2c", b"II*\0", b"MM\0*", b"\x00\x01", b"\x01\x00", b"BM", b"P6\n", b"P5\n", b"P4\n", b"P7\n", b"65536 ",
    b"# ", b"\x03\x01", b"\x11\x01",
)  # fmt: skip
LOADING = (CheckpointError, ConfigError)
STATE_RECIPE = {"data": "here", "epochs": 2}


def small_model() -> Any:
    return tiny_model(image_size=(32, 32), patch_size=8, n_layers=1, n_cls=3, decoder={"name": "linear"})


def _facts(model: Any) -> dict[str, Any]:
    return {"config": model.config.to_dict(), "info": {**vars(model.info), "source": ""}, "state": model.state_dict()}


def _finite(facts: dict[str, Any]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in facts["state"].values())


def _published(directory: Path, **options: Any) -> None:
    model = small_model()
    (directory / "variant.yml").write_text(yaml.safe_dump(as_published(model)))
    torch.save({"model": model.state_dict(), "epoch": 3}, directory / "checkpoint.pth", **options)


def _load_published(directory: Path) -> dict[str, Any]:
    model, settings = load_model(directory)
    return {**_facts(model), "settings": settings}


def _stream(directory: Path) -> None:
    _published(directory, _use_new_zipfile_serialization=False)


def _safetensors(directory: Path) -> None:
    model = small_model()
    (directory / "variant.yml").write_text(yaml.safe_dump(as_published(model)))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / "model.safetensors"
    )


def _npz(directory: Path) -> None:
    np.savez(directory / "a.npz", **{name: tensor.numpy() for name, tensor in small_model().state_dict().items()})


def _load_npz(directory: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(directory / "a.npz")[0]


def _ours(directory: Path) -> None:
    small_model().save_pretrained(directory, classes=generic_classes(3))


def _int8(directory: Path) -> None:
    small_model().save_pretrained(directory, dtype=torch.int8)


def _load_unsummed(directory: Path) -> dict[str, Any]:
    return _facts(from_pretrained(directory, verify=False))


def _load_ours(directory: Path) -> dict[str, Any]:
    model = from_pretrained(directory)
    classes = load_classes(model.info.classes) if model.info.classes else None
    facts = _facts(model)
    return {**facts, "info": {**facts["info"], "classes": bool(model.info.classes)}, "classes": classes}


def _pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def _with_pickle(archive: bytes, pickled: bytes) -> bytes:
    """The same zip file with another data.pkl, whose checksum is right."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return result.getvalue()


def _training_state(directory: Path) -> None:
    model = small_model()
    state = {"model": model.state_dict(), "step": 5, "recipe": STATE_RECIPE, "lr_scheduler": {"iter_max": 9}}
    training_state.save_state(directory / "checkpoint.pth", state)


def _load_state(directory: Path) -> dict[str, Any]:
    return training_state.load_state(directory / "checkpoint.pth", STATE_RECIPE)


def _recipe(directory: Path) -> None:
    recipe = Recipe(data="here", model="there", crop_size=32, epochs=2, batch_size=4, learning_rate=0.01)
    (directory / "recipe.yml").write_text(yaml.safe_dump(recipe.to_dict()))


def _data_set(directory: Path) -> None:
    make_data_set(directory, n=2, size=(8, 8))
    (directory / "val.txt").write_text("val/val_0\nval/val_1\n")
    entries = {
        "name": "streets", "classes": [{"name": n, "color": [i, 40, 200]} for i, n in enumerate("abcde")],
        "ignore_index": [255, 254], "reduce_zero": False, "splits": {"train": "train", "val": "val.txt"},
    }  # fmt: skip
    (directory / "dataset.yml").write_text(yaml.safe_dump(entries, sort_keys=False))


def _load_data_set(directory: Path) -> list[Any]:
    found = []
    for split in ("train", "val"):
        dataset = open_dataset(directory, split)
        found += [dataset.classes, dataset.ids, [sample.name for sample in dataset.samples]]
    return found


def _class_file(directory: Path) -> None:
    classes = generic_classes(5)
    entries = [{"id": i, "name": classes.names[i], "color": list(classes.palette[i])} for i in range(5)]
    (directory / "a.json").write_text(json.dumps(entries, indent=2))
    (directory / "a.yml").write_text(yaml.safe_dump(entries))


def _image(name: str, mode: str = "RGB", **options: Any) -> Format:
    def write(directory: Path) -> None:
        Image.fromarray(smooth_noise((24, 32), 1)).convert(mode).save(directory / name, **options)

    def plausible(pixels: np.ndarray) -> bool:
        return pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and 0 < pixels.size < 200_000_000

    label = f"image {name.rpartition('.')[2]} {mode}".removesuffix(" RGB")
    return Format(label, name, write, lambda f: read_image(f / name), (ImageError,), CHUNKS, plausible=plausible)


def _labels(name: str, depth: int = 8, **options: Any) -> Format:
    def write(directory: Path) -> None:
        ids = rectangles((24, 32), [*range(5), 255], 1)
        Image.fromarray(ids if depth == 8 else ids.astype(np.uint16) * 100).save(directory / name, **options)

    def plausible(ids: np.ndarray) -> bool:
        return ids.dtype in (np.uint8, np.uint16) and ids.ndim == 2 and ids.size > 0

    label = f"labels {name.rpartition('.')[2]} {depth} bit"
    return Format(label, name, write, lambda f: read_ids(f / name), (DataError,), CHUNKS, plausible=plausible)


FORMATS = (
    Format("pth zip", "checkpoint.pth", _published, _load_published, LOADING, PICKLE, summed=True, plausible=_finite),
    Format(
        "pickle in a pth zip", "checkpoint.pth", _published, _load_published, LOADING, PICKLE, plausible=_finite,
        inside=(_pickle_of, _with_pickle),
    ),
    Format("pth stream", "checkpoint.pth", _stream, _load_published, LOADING, PICKLE, plausible=_finite),
    Format("safetensors", "model.safetensors", _safetensors, _load_published, LOADING, JSON, plausible=_finite),
    Format("npz", "a.npz", _npz, _load_npz, LOADING),
    Format("variant.yml", "variant.yml", _published, _load_published, LOADING, YAML, plausible=_finite),
    Format("own config.json", "config.json", _ours, _load_ours, (*LOADING, ClassesError), JSON, summed=True),
    Format("own weights", "model.safetensors", _ours, _load_ours, LOADING, JSON, summed=True),
    Format("int8 weights", "model.safetensors", _int8, _load_unsummed, LOADING, JSON, plausible=_finite),
    Format("own classes.json", "classes.json", _ours, _load_ours, (*LOADING, ClassesError), JSON, summed=True),
    Format("training state", "checkpoint.pth", _training_state, _load_state, LOADING, PICKLE, summed=True),
    Format("recipe.yml", "recipe.yml", _recipe, lambda f: read_recipe(f / "recipe.yml"), (RecipeError,), YAML),
    Format("dataset.yml", "dataset.yml", _data_set, _load_data_set, (DataError,), YAML),
    Format("split list", "val.txt", _data_set, _load_data_set, (DataError,), NAMES),
    Format("class file json", "a.json", _class_file, lambda f: load_classes(f / "a.json"), (ClassesError,), JSON),
    Format("class file yml", "a.yml", _class_file, lambda f: load_classes(f / "a.yml"), (ClassesError,), YAML),
    _image("a.png"), _image("a.png", "P"), _image("a.png", "LA"), _image("a.jpg"), _image("a.webp"),
    _image("a.tif"), _image("a.tif", "CMYK", compression="tiff_lzw"), _image("a.gif"), _image("a.bmp"),
    _image("a.ppm"),
    _labels("a.png"), _labels("a.png", 16), _labels("a.tif"), _labels("a.tif", 16, compression="tiff_lzw"),
    _labels("a.bmp"),
)  # fmt: skip
