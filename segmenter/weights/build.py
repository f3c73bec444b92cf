"""State dict -> model: strict, all or nothing, with an account of what does not fit and why."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from segmenter.config import ModelConfig
from segmenter.model import Segmenter, create_segmenter
from segmenter.weights.read import MAX_NAMES, CheckpointError, listing
from segmenter.weights.recognise import Recognised, architecture, kind_of, n_blocks

_FOREIGN = {
    "mmseg": "it looks like mmsegmentation; `load_any` and `segmenter convert` read it",
    "timm": "it looks like a timm encoder without decoder; use `segmenter convert`",
    "npz": "it looks like a JAX ViT (augreg) encoder without decoder; use `segmenter convert`",
    "hf": "it looks like a Hugging Face encoder without decoder; use `segmenter convert`",
}
_COMPARED = ("n_cls", "patch_size", "d_model", "n_layers", "distilled", "image_size", "decoder")


def load_state(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    source: str = "the state dict",
    recognised: bool = False,
) -> None:
    """Copies every tensor of `state` into `model`, converted to the dtype of the parameter.

    A model on the meta device takes the tensors themselves instead of copies.

    Args:
        model: a Segmenter, or any module. state: exactly its names and shapes. source: file name for the message.
        recognised: the names are known to be those of a whole Segmenter, so a message need not look for other projects.
    Raises:
        CheckpointError: names or shapes differ, or a tensor is not floating point. The model is then unchanged.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [str(name) for name in state if name not in expected]
    shared = [name for name in expected if name in state]
    misshapen = [
        f"{name}: expected {tuple(expected[name].shape)}, found {tuple(state[name].shape)}"
        for name in shared
        if state[name].shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        hint = _hint(model.config, state, recognised) if isinstance(model, Segmenter) else ""
        lines = [f"{source} does not fit the model{': ' + hint if hint else ''}"]
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            lines += [f"  {len(names)} {what}: {listing(names)}"] if names else []
        lines += [f"  {len(misshapen)} misshapen:"] if misshapen else []
        lines += [f"    {line}" for line in misshapen[:MAX_NAMES]]
        lines += [f"    and {len(misshapen) - MAX_NAMES} more"] if len(misshapen) > MAX_NAMES else []
        raise CheckpointError("\n".join(lines))
    floating = [name for name in shared if expected[name].is_floating_point()]  # all but a batch norm's count
    odd = [f"{name} ({state[name].dtype})" for name in floating if not state[name].is_floating_point()]
    if odd:
        raise CheckpointError(f"{source}: weights must be floating point, found {listing(odd)}")
    if any(tensor.is_meta for tensor in expected.values()):
        ours = {name: state[name].detach().to(expected[name].dtype) for name in expected}
        model.load_state_dict(ours, assign=True)
    else:
        model.load_state_dict(dict(state))


def build(found: Recognised, impl: str, source: str) -> Segmenter:
    """A model of `found.config` that owns the tensors of `found.state`, in evaluation mode.

    The decoder of weights without one is random. Shapes are compared before anything is allocated, so a configuration
    that claims a giant model costs nothing: neither memory nor the time to make thousands of layers that the weights
    have not.

    Raises:
        CheckpointError: weights and configuration do not agree.
    """
    config, state, recognised = found.config, found.state, found.kind is not None
    asked = Counter(encoder=config.n_layers, decoder=config.decoder.get("n_layers", 0))
    if found.has_decoder and not asked <= n_blocks(state):
        raise CheckpointError(f"{source} does not fit the model: {_hint(config, state, recognised)}")
    with torch.device("meta"):
        model = create_segmenter(config, impl)
    if found.has_decoder:
        load_state(model, state, source, recognised)
        return model.eval()
    encoder = model.encoder
    load_state(encoder, {name.removeprefix("encoder."): t for name, t in state.items()}, source)  # refuses any other
    model = create_segmenter(config, impl)
    model.encoder = encoder
    return model.eval()


def _hint(config: ModelConfig | None, state: Mapping[str, torch.Tensor], recognised: bool) -> str:
    """Why `state` does not fit, in words; empty if it cannot be told."""
    kind = "segmenter" if recognised else kind_of(state)
    if kind in _FOREIGN:
        return _FOREIGN[kind]
    if kind is None:
        return "the names are those of no kind of weights known here"
    if not any(name.startswith("decoder.") for name in state):
        return "it is a pretrained backbone, not a segmentation checkpoint (no decoder); use `segmenter convert`"
    try:
        found = architecture(state, config is not None and config.pos_embed == "rotary")
    except CheckpointError as error:
        return str(error)
    asked = [] if config is None else [(name, getattr(config, name)) for name in _COMPARED]
    return "; ".join(filter(None, (_difference(name, found.get(name), value) for name, value in asked)))


def _difference(name: str, found: Any, asked: Any) -> str:
    if name == "decoder" and found is not None:
        found, asked = ({k: d[k] for k in ("name", "n_layers") if k in d} for d in (found, asked))
        found, asked = (" of ".join([d["name"], *(f"{d[k]} layers" for k in d if k != "name")]) for d in (found, asked))
    if found is None or found == asked:
        return ""
    if name == "n_cls":
        return f"{found} classes in the file, {asked} asked for"
    if name == "image_size":
        return f"position embedding for images of {found} in the file, {asked} asked for"
    return f"{name} {found} in the file, {asked} asked for"
