"""The model that a training run starts from."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch.nn as nn

from segmenter.config import check_windows, preset
from segmenter.data.datasets import Dataset
from segmenter.errors import cause
from segmenter.model import Segmenter, create_segmenter
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.weights.build import load_state
from segmenter.weights.convert import convert
from segmenter.weights.load import load_any, load_model
from segmenter.weights.read import CheckpointError

TIMM, PRESET = "timm/", "Seg-"
DECODER_LAYERS = 2
_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
_STARTED = "; started from "
_POSITIONS = ("pos_embed", "pos_embed_mode", "pos_embed_check", "rope_theta")
_KEPT = ("normalization", *_POSITIONS)  # of an encoder, unless the recipe says otherwise


def starting_model(recipe: Recipe, dataset: Dataset) -> Segmenter:
    """A model for `dataset`, in training mode; what is random in it follows from torch's seed.

    Args:
        recipe: completed.
    Raises:
        CheckpointError, ConfigError: weights that cannot be used. RecipeError: settings that contradict each other.
    """
    fields = {
        "n_cls": dataset.n_cls,
        "image_size": recipe.crop_size,
        "normalization": recipe.normalization,
        "dropout": 0.0 if recipe.freeze_backbone else recipe.dropout,
        "drop_path_rate": 0.0 if recipe.freeze_backbone else recipe.drop_path,
        "pos_embed_mode": recipe.pos_embed_mode,
        "pos_embed_check": recipe.pos_embed_check,
    }
    if recipe.model.startswith(PRESET) and not os.path.exists(Path(recipe.model)):
        model = _random(recipe, fields)
    else:
        fields |= {"decoder": _decoder(recipe), "patch_size": recipe.patch_size}
        model = _pretrained(recipe, fields)
    if recipe.decoder_batch_norm and not model.config.decoder.get("batch_norm"):
        raise RecipeError("decoder_batch_norm is of a linear decoder, which this model has not: say decoder linear")
    if recipe.n_layers is not None:
        model = first_layers(model, recipe.n_layers, recipe.impl)
    return prepare(model, recipe, dataset)


def prepare(model: Segmenter, recipe: Recipe, dataset: Dataset) -> Segmenter:
    """In training mode, with what the recipe says besides weights: windows, source, and which parts are frozen.

    Raises:
        ConfigError: windows that a saved model could not be loaded with.
    """
    check_windows(recipe.window_size, recipe.window_stride, model.config.image_size)
    origin = recipe.model.split("/")[-1]
    if _STARTED in model.info.source:  # a model that was trained here knows its own start
        origin += f" ({model.info.source})"
    model.info = dataclasses.replace(
        model.info,
        normalization=model.config.normalization,
        window_size=recipe.window_size,
        window_stride=recipe.window_stride,
        classes=None,  # the data set's own are saved with the model
        weights="trained",
        source=f"{dataset.key} {recipe.split}, {len(dataset)} images{_STARTED}{origin}",
    )
    if recipe.freeze_backbone:
        model.encoder.requires_grad_(False)
    for name in ("head", "head_dist"):  # the ImageNet classifiers, which nothing here uses
        if hasattr(model.encoder, name):
            getattr(model.encoder, name).requires_grad_(False)
    if recipe.recompute is not None:
        model.recompute(recipe.recompute)
    return model.train()


def first_layers(model: Segmenter, n_layers: int, impl: str = "auto") -> Segmenter:
    """The same model with only the first blocks of its encoder, stochastic depth spread over these.

    Raises:
        RecipeError: it has fewer.
    """
    if n_layers > model.config.n_layers:
        raise RecipeError(f"n_layers {n_layers}: the encoder has only {model.config.n_layers} blocks")
    shorter = create_segmenter(dataclasses.replace(model.config, n_layers=n_layers), impl)
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (match := _BLOCK.match(name)) or int(match[1]) < n_layers
    }
    load_state(shorter, kept, "the model's first layers")
    shorter.info = model.info
    return shorter


def _decoder(recipe: Recipe) -> dict[str, Any]:
    """That of files that have none; of others, a name that is not None must agree."""
    if recipe.decoder == "linear":
        return {"name": "linear", "batch_norm": recipe.decoder_batch_norm}
    named = {} if recipe.decoder is None else {"name": recipe.decoder}
    layers = DECODER_LAYERS if recipe.decoder_layers is None else recipe.decoder_layers
    return {**named, "n_layers": layers, "dropout": recipe.decoder_dropout}


def _random(recipe: Recipe, fields: dict[str, Any]) -> Segmenter:
    """A preset, whose name says patch size and decoder."""
    fields = {name: value for name, value in fields.items() if value is not None}
    config = preset(recipe.model, **fields)
    for name, asked, found in (
        ("patch_size", recipe.patch_size, config.patch_size),
        ("decoder", recipe.decoder, config.decoder["name"]),
    ):
        if asked not in (None, found):
            raise RecipeError(f"{name} {asked}: the preset {recipe.model} has {found}; take the preset of that name")
    if config.decoder["name"] == "mask_transformer":
        config = dataclasses.replace(config, decoder={"name": "mask_transformer", **_decoder(recipe)})
    elif recipe.decoder_batch_norm:
        config = dataclasses.replace(config, decoder={"name": "linear", "batch_norm": True})
    return create_segmenter(config, recipe.impl)


def _pretrained(recipe: Recipe, fields: dict[str, Any]) -> Segmenter:
    source: str | nn.Module = recipe.model
    exists = os.path.exists(Path(recipe.model))
    if not exists and recipe.model.startswith(TIMM):
        source = _timm(recipe.model.removeprefix(TIMM))
    elif not exists:
        raise CheckpointError(
            f"{recipe.model}: no such file or folder, and neither a preset (Seg-S-Mask/16) nor timm/NAME"
        )
    if exists and recipe.new_decoder:
        with contextlib.suppress(CheckpointError):  # of an encoder alone, which gets a decoder below
            return _with_new_decoder(load_model(recipe.model)[0], fields, recipe.impl)
    try:
        model = load_any(source, impl=recipe.impl, **fields)
    except CheckpointError as error:
        hint = "; new_decoder: true puts a random decoder on its encoder" if "asked for, the file" in str(error) else ""
        raise CheckpointError(f"{error}{hint}") from error
    found = model.config.decoder.get("n_layers", 0)
    if recipe.decoder_layers not in (None, found):
        raise RecipeError(
            f"decoder_layers {recipe.decoder_layers}: the decoder of {recipe.model} has {found}; "
            "new_decoder: true makes another"
        )
    return model


def _with_new_decoder(model: Segmenter, fields: dict[str, Any], impl: str) -> Segmenter:
    """A random decoder on the encoder of a model that has another."""
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("encoder.")}
    kept = {name: getattr(model.config, name) for name in ("n_heads", "norm_eps", "backbone", *_KEPT)}
    asked = {name: value for name, value in fields.items() if value is not None}
    grid = model.encoder.patch_embed.grid_size
    converted = convert(encoder, kind="segmenter", grid=grid, **{**kept, **asked})
    fresh = create_segmenter(converted.config, impl)
    load_state(fresh.encoder, {n.removeprefix("encoder."): t for n, t in converted.state.items()}, "the encoder")
    return fresh


def _timm(name: str) -> nn.Module:
    try:  # a broken torchvision makes timm raise other things than ImportError
        import timm

        return timm.create_model(name, pretrained=True)
    except Exception as error:
        raise CheckpointError(
            f"timm cannot make {name!r} with its pretrained weights ({cause(error)}); without timm "
            "(pip install timm) or a network, give the path of a weight file"
        ) from error
