"""What training tools wrap around weights, taken off: dictionaries, prefixes of names, averages beside plain weights.

All of it is said, in notes for people.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from segmenter.weights.unpickle import Inert, Refused, StoredTensor, listing, short, type_name

_PLAIN = (
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "params", "weights",
    "model_weights", "net_state_dict", "network_state_dict",
)  # fmt: skip
_AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "model_state_dict_ema",
    "ema_model_state_dict", "ema", "averaged_model", "average_model", "average", "swa_model", "net_ema", "ema_net",
    "params_ema",
)  # fmt: skip
_OUTER = (
    "module", "model", "net", "network", "segmentor", "segmenter", "ema_model", "averaged_model", "_model",
    "base_model", "wrapped_model", "wrapped", "student", "teacher", "learner", "engine", "lightning_module",
    "pl_module",
)  # fmt: skip
_ANYWHERE = {  # names that no layer has: torch.compile, FSDP, activation checkpointing, Lightning Fabric and DeepSpeed
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
_BESIDE = re.compile(
    r"(n_averaged|steps|num_updates|decay)$"
    r"|(criterion|\w*loss\w*|\w*metrics?\w*|(\w+_)?(acc|accuracy|m?iou|jaccard|dice|f1|confmat)(_\w+)?)\."
)
_ARRAYS = ("ndarray", "numpy.ndarray", "numpy.core.numeric._frombuffer")  # trusted, and as data by protocol
MAX_DEPTH, MAX_WEIGHTS = 8, 100_000


def unwrap(data: Any, averaged: bool | None) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The weights in what a file holds.

    Args:
        averaged: where weights are kept twice, whether to take the averaged ones; None: the averaged ones, by which
            models are scored, but of a training of this project, which keeps its average in best/ and final/, the
            plain ones.
    Returns:
        (names -> tensors or `StoredTensor`, what else there is, notes).
    Raises:
        Refused: no weights, weights that are no tensors, or not those that `averaged` asks for.
    """
    extra: dict[str, Any] = {}
    notes: list[str] = []
    taken, keys = False, None  # taken: whether the averaged ones were
    for _ in range(MAX_DEPTH):
        data = _mapping(data)
        keys = keys or _keys(data)
        plain, average = _kept(data)
        if plain is None and average is None:
            break
        if plain is not None and average is not None:
            taken = averaged if averaged is not None else average != "average"
            other, flag = (plain, "plain") if taken else (average, "averaged")
            notes.append(
                f"{'averaged' if taken else 'plain'} weights taken ({average if taken else plain}), "
                f"averaged={not taken} takes the {flag} ones ({other})"
            )
        elif average is not None:
            taken = True
            notes.append(f"averaged weights taken ({average}), the file has no others")
        key = average if plain is None or (taken and average is not None) else plain
        extra = {**{k: v for k, v in data.items() if k != key}, **extra}
        data = data[key]
    weights = _tensors(data)
    if averaged is not None and averaged != taken:
        raise Refused(f"holds no {'averaged' if averaged else 'plain'} weights; its keys are: {keys}")
    return _renamed(weights, notes), extra, notes


def _mapping(data: Any) -> Mapping[Any, Any]:
    if isinstance(data, torch.nn.Module):  # only with allow_pickle
        data = torch.nn.Module.state_dict(data)
    if isinstance(data, Inert):
        raise Refused(
            f"holds an object of {data.name}, not a state dict; if you trust this file pass allow_pickle=True"
        )
    if not isinstance(data, Mapping):
        raise Refused(f"holds a {type_name(data)}, not a state dict")
    return _regrouped(dict(data))


def _regrouped(data: dict[Any, Any]) -> dict[Any, Any]:
    """{"model.a": ..., "ema.a": ...}, as Lightning writes it, and the ema_* of mmcv 1.x -> a dictionary of each."""
    if not all(isinstance(name, str) for name in data):
        return data
    first = {name: name.partition(".")[0] for name, value in data.items() if _is_tensor(value)}
    if set(first.values()) & set(_AVERAGED) and set(first.values()) & set(_PLAIN):
        groups: dict[Any, Any] = {}
        for name, value in data.items():
            if name in first and first[name] in (*_PLAIN, *_AVERAGED):
                groups.setdefault(first[name], {})[name.partition(".")[2]] = value
            else:
                groups[name] = value
        return groups
    twins = {f"ema_{name.replace('.', '_')}": name for name in first}
    if pairs := {twins[name]: data[name] for name in first if name in twins}:  # swapped before it is saved
        averaged = {name: data[name] for name in first if name not in twins}
        return {"state_dict": {**averaged, **pairs}, "state_dict_ema": averaged}
    return data


def _kept(data: Mapping[Any, Any]) -> tuple[str | None, str | None]:
    """The keys of the plain and of the averaged weights."""
    plain = next((key for key in _PLAIN if _holds_weights(data.get(key), set())), None)
    average = next((key for key in _AVERAGED if _holds_weights(data.get(key), set())), None)
    if plain == "state_dict" and _holds_weights(data.get("current_model_state"), set()):  # Lightning's WeightAveraging
        return "current_model_state", "state_dict"
    if plain == "state_dict" and average == "ema_state_dict" and "message_hub" in data:  # mmengine swaps them
        return average, plain
    return plain, average


def _holds_weights(value: Any, seen: set[int]) -> bool:
    """seen: the dictionaries that were looked into, which may hold each other."""
    if isinstance(value, torch.nn.Module):
        return True
    if not isinstance(value, Mapping) or id(value) in seen or len(seen) > 100:
        return False
    seen.add(id(value))
    inner = (value.get(key) for key in (*_PLAIN, *_AVERAGED))
    return any(map(_is_tensor, value.values())) or any(_holds_weights(part, seen) for part in inner)


def _tensors(data: Mapping[Any, Any]) -> dict[str, Any]:
    if not any(_is_tensor(value) or _is_odd(value) for value in data.values()):
        arrays = [short(key) for key, value in data.items() if type_name(value) in _ARRAYS]
        if arrays:
            raise Refused(f"holds arrays of numpy, no tensors: {listing(arrays)}; save them as .npz, which is read")
        objects = [f"{short(key)} ({value.name})" for key, value in data.items() if isinstance(value, Inert)]
        hint = f"; if you trust this file, allow_pickle=True makes {listing(objects)}" if objects else ""
        raise Refused(f"holds no weights; its keys are: {_keys(data)}{hint}")
    odd = [f"{short(k)} ({type_name(v)})" for k, v in data.items() if not _is_tensor(v) and not _is_odd(v)]
    if odd:
        raise Refused(f"has weights that are no tensors: {listing(odd)}")
    if len(data) > MAX_WEIGHTS:
        raise Refused(f"refused, it has {len(data)} weights")
    for name, value in data.items():
        if type(name) is not str or len(name) > 500:
            raise Refused(f"has a weight whose name is no text of at most 500 characters: {short(name)}")
        if _is_odd(value):
            raise Refused(f"{short(name)} is no plain tensor ({value.name})")
    return dict(data)


def _renamed(state: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Without the prefixes and inner names of wrappers, as long as no two names become one."""
    names = {name: name for name in state}  # now -> in the file
    removed: list[str] = []
    while (found := _prefix(names)) is not None:
        prefix, beside = found
        removed += [prefix] if prefix else []
        if beside:
            notes.append(f"left out, they belong to the training: {listing(beside)}")
        names = {name[len(prefix) :]: old for name, old in names.items() if name not in set(beside)}
    names, inner = _inside(names)
    if inner:
        notes.append(f"removed inside names: {listing(inner)}")
    if removed:
        notes.insert(0, f"prefix {''.join(removed)} removed from the names")
    return {name: state[old] for name, old in names.items()}


def _prefix(names: dict[str, str]) -> tuple[str, list[str]] | None:
    """A wrapper's prefix that all weights share, or "", and what is beside them that is no weight of the model."""
    beside = [name for name in names if _BESIDE.match(name)]
    first = {name.partition(".")[0] if "." in name else "" for name in names.keys() - set(beside)}
    if len(first) == 1 and first & {*_OUTER, *_ANYWHERE}:
        return f"{first.pop()}.", beside
    beside = [name for name in beside if "." in name]  # without a wrapper, a tensor of its own may be the model's
    return ("", beside) if first and beside else None


def _inside(names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """(names without the wrappers inside them, which): `_ANYWHERE`, and a `module` that is all that its parent has."""
    parents = {name[: at.start()] for name in names for at in re.finditer(r"\.module(?=\.)", name)}
    for name in names if parents else ():
        for at in re.finditer(r"\.", name):
            if not name.startswith("module.", at.end()):
                parents.discard(name[: at.start()])
    removed: set[str] = set()
    plain: dict[str, str] = {}
    for name, old in names.items():
        parts, kept, at = name.split("."), [], 0
        for part in parts:
            if part in _ANYWHERE or (part == "module" and at and name[: at - 1] in parents):
                removed.add(part)
            else:
                kept.append(part)
            at += len(part) + 1
        plain[".".join(kept)] = old
    return (plain, sorted(removed)) if len(plain) == len(names) else (names, [])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | StoredTensor)


def _is_odd(value: Any) -> bool:
    """A tensor that is not plain: sparse, quantised, nested, without data ..."""
    return isinstance(value, Inert) and value.name.startswith(("torch._utils._rebuild_", "a "))


def _keys(data: Mapping[Any, Any]) -> str:
    return listing([short(key) for key in data]) or "none"
