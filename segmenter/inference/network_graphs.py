"""CUDA graphs where users are: the network on one batch of windows, captured by itself once a shape comes again.

`segment`, `segment_stream`, `predict` and `eval` cut images of any size into windows of one size, so what they run the
network on has few shapes. Nobody asks for these graphs, so nothing may go past them: a model that is not ours through
and through, or that anybody listens in to, runs without, and so does every call that something observes.
"""

import functools
import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from segmenter.cache import Cache
from segmenter.guard import DECISION, OF_EVERY_MODULE, altered, hooks_of_all, qualified, replaced
from segmenter.inference.cuda_graphs import PATIENCE, Graphs, Watched, first_parameter, same
from segmenter.inference.windows import masks_of
from segmenter.ops import unobserved_but_for_autocast

MAX_SHAPES = 8  # of one model in one compute type: as many as there are batches of 1 to 8 windows
_OURS = ("torch.nn.modules.", "segmenter.")


def network_of(model: nn.Module, cuda_graphs: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives the masks of a batch of windows: `masks_of(model, windows)`, by graphs where that is the same.

    Args:
        cuda_graphs: False: never by graphs.
    Returns:
        a function of windows (B, 3, h, w), normalised, or (B, h, w, 3) bytes; its results are the caller's.
    """
    direct = functools.partial(masks_of, model)
    parameter = first_parameter(model)
    if not cuda_graphs or parameter is None or not _may_have_graphs(parameter):
        return direct
    half = torch.is_autocast_enabled(parameter.device.type)
    if half and parameter.dtype != torch.float32:  # sums of half weights in float32: no type says that
        return direct
    dtype = torch.get_autocast_dtype(parameter.device.type) if half else parameter.dtype
    with _making:
        by_type = _graphs.setdefault(model, {})
        if dtype not in by_type:
            by_type[dtype] = NetworkGraphs(model, dtype)
    return by_type[dtype]


def graphs_of(model: nn.Module) -> "list[NetworkGraphs]":
    """What has been captured for a model, by itself, one for each compute type that it was called in."""
    return list(_graphs.get(model, {}).values())


def forget(model: nn.Module) -> None:
    """Ends the graphs of a model, with the memory that they and its old weights take: it is moved, or trained."""
    with _making:
        by_type = _graphs.pop(model, {})
    for graphs in by_type.values():
        graphs.end()


def release(model: nn.Module) -> bool:
    """Gives back the memory of graphs that a model's calls captured by themselves. Whether there were any."""
    return sum(graphs.release() for graphs in graphs_of(model)) > 0


class Key(NamedTuple):
    """What a graph is for: a batch of windows, and what else decides what the network launches for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    normalization: str
    settings: tuple


class NetworkGraphs(Graphs):
    """`masks_of(model, windows)`, each shape captured when it comes again; called like the network.

    It does not keep the model alive. Any change of weights, layers, hooks, methods, modes or attributes ends the
    graphs.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(dtype, MAX_SHAPES)
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        return self._model()

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Masks (B, n_cls, gh, gw) of windows."""
        model = self.model
        if not unobserved_but_for_autocast(windows) or torch.cuda.is_current_stream_capturing():
            return masks_of(model, windows)
        key = Key(windows.shape, windows.dtype, model.info.normalization, _settings())
        with self._lock, self._on_device():
            masks = self._replay(key, windows) or self._capture_in_time(key, windows)
            if masks is not None:
                return masks[0].clone()
        return masks_of(model, windows)

    def end(self) -> None:
        """Drops everything."""
        with self._lock:
            self._forget()

    def release(self) -> bool:
        """Gives back the graphs' memory, and captures no more. Whether there were any."""
        with self._lock:
            return self._give_way("a call")

    def _try(self, shape: Key, x: torch.Tensor) -> None:
        if why_not(self.model):
            met = self._met[shape]  # asked again later: hooks go
            met.calls, met.wait = 0, min(2 * met.wait, PATIENCE)
        else:
            super()._try(shape, x)

    def _function(self, windows: torch.Tensor) -> tuple[torch.Tensor]:
        with self._surroundings():
            return (masks_of(self._network, windows),)

    def _watch(self) -> Any:
        return _Everything(self.model)

    @staticmethod
    def _named(x: torch.Tensor) -> str:
        return f"windows {tuple(x.shape)}"


def _precision(older: Callable[[], Any], newer: str) -> Any:
    """Of float32 products: one of PyTorch's two interfaces raises where only the other was used."""
    try:
        return older()
    except RuntimeError:
        return operator.attrgetter(f"{newer}.fp32_precision")(torch.backends)


_SWITCHES = (
    functools.partial(_precision, torch.get_float32_matmul_precision, "cuda.matmul"),
    functools.partial(_precision, torch._C._get_cudnn_allow_tf32, "cudnn.conv"),
    torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
    torch._C._get_cudnn_deterministic,
    torch._C._get_cudnn_benchmark,
    torch.are_deterministic_algorithms_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
    lambda: torch.backends.cudnn.enabled,
)
_graphs: "weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, NetworkGraphs]]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _may_have_graphs(parameter: torch.Tensor) -> bool:
    return parameter.is_cuda and not torch.compiler.is_compiling()


def why_not(model: nn.Module) -> str | None:
    """Why calls of a model are not captured by themselves, in words; None if they are."""
    if reason := altered() or ("hooks on all modules" if hooks_of_all() else None):
        return reason
    tensors = [*model.parameters(), *model.buffers()]
    if len({t.device for t in tensors}) > 1:
        return "parts on several devices"
    if kinds := {type(t) for t in tensors} - {nn.Parameter, torch.Tensor}:
        return f"weights of type {qualified(kinds.pop())}"
    for name, module in model.named_modules():
        cls, name = type(module), name or "the model"
        if not cls.__module__.startswith(_OURS):
            return f"{name}, which is {qualified(cls)}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"hooks of {name}"
        if "_compiled_call_impl" in module.__dict__ or any(callable(getattr(cls, n, None)) for n in module.__dict__):
            return f"a replaced method of {name}"
        if cls.forward is not nn.Module.forward and (reason := replaced(cls)):  # lists of layers have none
            return reason
        if module.training:
            return f"training mode of {name}"
    return None


# What these do is in their weights, and in none of these attributes while they are evaluated.
_WITHOUT_EFFECT: dict[type, tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "training"),
    nn.LayerNorm: ("elementwise_affine", "training"),
    nn.Dropout: ("p", "inplace"),
    nn.Identity: ("training",),
    nn.GELU: ("training",),
}


class _Everything(Watched):
    """The tensors of a model, and all that decides what calling it does: layers, hooks, modes, attributes, methods.

    Who writes to weights past PyTorch's counting clears caches, or calls `eval()`, which does: that counts as well. It
    holds no module but the layers, and so does not keep the model alive.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        modules = list(model.modules())
        for module in modules:
            if hasattr(type(module), "decide"):
                module.__dict__.setdefault(DECISION, None)  # which its first call would add
        self.states = [module.__dict__ for module in modules]
        self.parents = [module._modules for module in modules if module._modules]
        self.children = list(map(dict, self.parents))
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        by_names: dict[tuple[str, ...], list[dict]] = {}  # most modules are of a few kinds: one look for each kind
        for module in modules:
            by_names.setdefault(self._watched_attributes(module), []).append(module.__dict__)
        by_names.pop((), None)
        self.getters = [(operator.itemgetter(*names), states) for names, states in by_names.items()]
        self.layers = [layer for layers in self.children for layer in layers.values()]
        self.kinds, self.sizes = list(map(type, self.layers)), list(map(len, self.states))
        self.attributes = self._attributes()
        # of nn.Module itself, `altered` tells
        bases = {base for module in modules for base in type(module).__mro__} - {nn.Module, object}
        self.classes = list(map(vars, bases))
        self.members = list(map(dict, self.classes))
        self.caches = [cache for state in self.states if isinstance(cache := state.get("cache"), Cache)]
        self.cleared = self._cleared()

    def unchanged(self) -> bool:
        return (
            super().unchanged()
            and not any(self.hooks)
            and same(self.parents, self.children)
            and list(map(type, self.layers)) == self.kinds
            and list(map(len, self.states)) == self.sizes
            and same(self._attributes(), self.attributes)
            and self._cleared() == self.cleared
            and self.classes == self.members
            and not (hooks_of_all() or altered())
        )

    @staticmethod
    def _watched_attributes(module: nn.Module) -> tuple[str, ...]:
        left_out = {*OF_EVERY_MODULE - {"training"}, DECISION, *_WITHOUT_EFFECT.get(type(module), ())}
        return tuple(name for name in module.__dict__ if name not in left_out)

    def _attributes(self) -> list[Any] | None:
        found: list[Any] = []
        try:
            for get, states in self.getters:
                found += map(get, states)
        except KeyError:  # one has gone
            return None
        return found

    def _cleared(self) -> list[int]:
        return [cache.cleared for cache in self.caches]


def _settings() -> tuple:
    """Switches of PyTorch that decide what an operator launches."""
    return tuple([switch() for switch in _SWITCHES])
