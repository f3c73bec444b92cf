"""Which implementation runs: by argument, by device, part by part; and when a block must not use fused operators."""

import contextlib
import sys
import types
from importlib import metadata

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from segmenter import create_segmenter
from segmenter import ops as implementation
from segmenter.inference import segment
from segmenter.inference.windows import windows_of
from segmenter.kernels import reference
from segmenter.layers import Block
from segmenter.ops import (
    AUTO,
    EAGER,
    Automatic,
    ImplementationError,
    explain,
    parts,
    select,
    why_not_triton,
)
from tests.conftest import NO_KERNELS
from tests.support.tiny import tiny_config, tiny_model


@pytest.fixture(autouse=True)
def fresh():
    for function in (why_not_triton, implementation.why_no_triton):
        function.cache_clear()
    yield
    for function in (why_not_triton, implementation.why_no_triton):
        function.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Pretends that there is a GPU of this capability, and this Triton."""

    def pretend(capability=None, triton="3.6.0", interpreting=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(implementation, "_interpreting", lambda: interpreting)

        def version(name):
            if triton is None:
                raise metadata.PackageNotFoundError(name)
            return triton

        monkeypatch.setattr(metadata, "version", version)
        if NO_KERNELS:
            monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))

    return pretend


def test_names():
    assert (select("auto").name, select("eager").name) == ("auto", "eager")
    assert select("eager").on(torch.zeros(1)) is EAGER
    with pytest.raises(ValueError, match="choose one of auto, eager, triton"):
        select("cuda")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "no CUDA device"),
        ({"capability": (7, 5)}, "the GPU has compute capability 7.5, the kernels need 8.0"),
        ({"capability": (9, 0), "triton": "3.2.0"}, "triton 3.2.0 is too old, the kernels need 3.6"),
        ({"capability": (9, 0), "triton": None}, "triton is not installed"),
        ({"capability": (8, 0)}, None),
        ({"capability": (12, 0), "triton": "3.10.1"}, None),
    ],
)
def test_where_kernels_can_run(machine, facts, reason):
    machine(**facts)
    got = why_not_triton()
    assert got is None if reason is None else reason in got
    name, why = explain("auto")
    assert (name, why) == (("eager", got) if reason else ("triton", "for tensors on the GPU, eager on the CPU"))


def test_triton_is_refused_with_the_way_out(machine):
    pytest.importorskip("triton")
    machine()
    for build in (lambda: select("triton"), lambda: create_segmenter(tiny_config(), impl="triton")):
        with pytest.raises(ImplementationError, match='no CUDA device; use impl="eager" or impl="auto"'):
            build()
    assert explain("triton")[0] == "none"
    machine(interpreting=True)
    assert select("triton").name == explain("triton")[0] == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_goes_by_the_tensors(machine, dtype, monkeypatch):
    machine(capability=(9, 0))
    monkeypatch.setattr(implementation, "KERNELS", [EAGER._replace(name="triton")])
    on_gpu = types.SimpleNamespace(dtype=dtype, device=torch.device("cuda:0"))
    assert AUTO.on(torch.zeros(1, dtype=dtype)) is EAGER
    assert AUTO.on(on_gpu).name == ("triton" if dtype == torch.float32 else "eager")
    machine(capability=(7, 5))
    why_not_triton.cache_clear()
    assert AUTO.on(on_gpu) is EAGER


def test_a_model_on_the_cpu_stays_eager_where_a_gpu_is(machine):
    machine(capability=(9, 0))
    model = tiny_model()
    assert (model.impl, model.decoder.ops.name) == ("eager", "auto")
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 64, 64)


def test_parts_are_told():
    model = tiny_model()
    operators = ("pixels_to_tokens", "attention", "layernorm_linear", "layernorm_mlp", "mask_head", "windows_argmax")
    assert parts(model) == dict.fromkeys(operators, "eager")
    model.encoder.blocks[1].mlp.fc1.register_forward_hook(lambda *a: None)
    assert parts(model)["layernorm_mlp"] == "eager (2 of 3), layer by layer (hooks) (1 of 3)"
    model.encoder.patch_embed.register_forward_hook(lambda *a: None)
    assert parts(model)["pixels_to_tokens"] == "layer by layer (hooks)"


# ---------------------------------------------------------------------------------------------------------------------
# What fused operators would pass over


class Adapted(torch.nn.Module):
    """As PEFT's LoRA layer: it has the weight of the layer that it wraps, and computes something else."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        y = self.base(x)
        return (y[0] + 1, y[1]) if isinstance(y, tuple) else y + 1  # an attention layer returns its weights, too


def replace(block, path, make):
    parent, name = block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(parent, name, make(getattr(parent, name)))


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2", "attn", "mlp"])
def test_adapted_layers_are_called(path):
    block = Block(64, 1, 128, 0.0, 0.0).eval()
    x = torch.randn(2, 5, 64)
    before = block(x)
    replace(block, path, Adapted)
    if path == "attn":  # an attention of another class has other attributes; its own forward is all that counts
        block.attn.heads = 1
    assert block.why_not_fused("attention" if path.startswith(("attn", "norm1")) else "mlp") is not None
    assert (block(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("path", ["attn.qkv", "attn", "attn.proj_drop", "mlp.act", "mlp", "mlp.drop", "norm1", "norm2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run(path, kind):
    block, calls = Block(64, 1, 128, 0.0, 0.0).eval(), []
    handle = getattr(block.get_submodule(path), kind)(lambda *args: calls.append(path))
    block(torch.randn(1, 3, 64))
    assert calls
    handle.remove()
    assert block.why_not_fused("attention") is block.why_not_fused("mlp") is None


def test_parametrised_and_replaced_forwards_are_called():
    block = Block(64, 1, 128, 0.0, 0.0).eval()
    x = torch.randn(1, 3, 64)
    torch.nn.utils.parametrize.register_parametrization(block.mlp.fc2, "weight", torch.nn.Tanh())
    assert block.why_not_fused("mlp") == (
        "torch.nn.utils.parametrize.ParametrizedLinear in place of torch.nn.modules.linear.Linear"
    )
    block.attn.qkv.forward = lambda x: torch.zeros(*x.shape[:-1], 192)
    assert block.why_not_fused("attention") == "a replaced forward"
    assert torch.isfinite(block(x)).all()


def test_weights_of_another_class_are_left_alone():
    from torch.testing._internal.two_tensor import TwoTensor

    block = Block(64, 1, 128, 0.0, 0.0).eval()
    weight = block.mlp.fc1.weight.data
    block.mlp.fc1.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    assert block.why_not_fused("mlp") == "weights of type torch.testing._internal.two_tensor.TwoTensor"


def test_hooked_mask_norm_is_called(model):
    im = torch.randn(1, 3, 64, 64)
    before, calls = model.masks(im), []
    model.decoder.mask_norm.register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(model.masks(im), before)
    assert calls == [1]


def test_triton_model_equals_eager():
    """Whole model through the kernels, under the interpreter; bfloat16 and float32."""
    pytest.importorskip("triton")
    if not implementation._interpreting() and not torch.cuda.is_available():
        pytest.skip("needs a GPU or Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    im = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0)).to(device)
    for decoder in ({"name": "mask_transformer", "n_layers": 1}, {"name": "linear"}):
        eager = tiny_model(decoder=decoder).to(device)
        fast = create_segmenter(eager.config, impl="triton").eval().to(device)
        fast.load_state_dict(eager.state_dict())
        assert fast.impl == "triton"
        assert set(parts(fast).values()) == {"triton"}
        with torch.inference_mode():
            want = eager.double()(im.double())
            torch.testing.assert_close(fast(im).double(), want, atol=2e-4, rtol=1e-4)
            with torch.autocast(device, torch.bfloat16):
                low = fast(im)
            assert (low.float() - want).abs().max() < 0.3
    assert reference.attention is EAGER.attention


def test_dropout_left_on_in_evaluation_is_applied():
    """Monte-Carlo dropout: the model in evaluation mode, its dropout layers in training mode."""
    block = Block(64, 1, 128, 0.5, 0.0).eval()
    block.mlp.drop.train()
    assert (block.why_not_fused("attention"), block.why_not_fused("mlp")) == (None, "dropout")
    x = torch.randn(2, 5, 64)
    assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize(
    ("n_cls", "stride", "name"),
    [(1024, 14, "triton"), (1025, 14, "eager"), (5, 2, "triton"), (5, 1, "eager")],  # 8 by 8 windows, 15 by 15
)
def test_labels_beyond_the_limits_of_the_kernel(monkeypatch, n_cls, stride, name):
    """`impl="auto"` takes plain PyTorch for them, and impl="triton" the kernel, which raises."""

    def operators(name):
        return EAGER._replace(name=name, windows_argmax=lambda *args: name)

    kernels = operators("triton")
    monkeypatch.setattr(Automatic, "on", lambda self, x: kernels)
    monkeypatch.setattr(segment, "EAGER", operators("eager"))
    windows = windows_of((30, 30), 16, stride, 16)
    masks = torch.zeros(1, len(windows.tops) * len(windows.lefts), 1, 1, 1).expand(-1, -1, -1, -1, n_cls)
    assert segment.labels_of_windows(types.SimpleNamespace(ops=AUTO), masks, windows) == name
    assert segment.labels_of_windows(types.SimpleNamespace(ops=kernels), masks, windows) == "triton"
    assert segment.labels_of_windows(types.SimpleNamespace(ops=operators("asked")), masks, windows) == "asked"


def test_parts_tell_where_labels_come_from(monkeypatch):
    few, many = tiny_model(), tiny_model(n_cls=1025)
    assert parts(few)["windows_argmax"] == parts(many)["windows_argmax"] == "eager"
    monkeypatch.setattr(Automatic, "on", lambda self, x: EAGER._replace(name="triton"))
    assert parts(few)["windows_argmax"] == "triton"
    assert parts(many)["windows_argmax"] == "eager (1025 classes)"
    many.ops = EAGER._replace(name="triton")  # asked for: it will raise, and say so
    assert parts(many)["windows_argmax"] == "triton"


# ---------------------------------------------------------------------------------------------------------------------
# Operations that are made of operators


def half(ops, x, weight, bias):
    return ops.linear(x, weight, bias, residual=x)


def dispatched(run, monkeypatch):
    """How often `run` calls operators through PyTorch's dispatcher, by the formula as it is written."""
    calls = []
    monkeypatch.setattr(implementation, "_COMPOSED", {half: lambda x, *parameters: half(EAGER, x, *parameters)})
    kernels = implementation.load_kernels()
    monkeypatch.setattr(implementation, "load_kernels", lambda: kernels)
    counted = type(kernels)(*kernels._replace(linear=lambda *a, **kw: calls.append(1) or reference.linear(*a, **kw)))
    run(lambda x, *parameters: counted.compose(half, x, *parameters))
    return len(calls)


@contextlib.contextmanager
def watching():
    with torch.no_grad(), FlopCounterMode(display=False):
        yield


@contextlib.contextmanager
def profiling():
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


@contextlib.contextmanager
def in_half_precision():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


@contextlib.contextmanager
def differentiating_forwards():
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        yield


X, PARAMETERS = torch.randn(3, 16), (torch.randn(16, 16), torch.randn(16))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_where_nobody_notices_operators_are_composed(around, monkeypatch):
    pytest.importorskip("triton")
    with around():
        assert dispatched(lambda compose: compose(X, *PARAMETERS), monkeypatch) == 0


@pytest.mark.parametrize(
    "around",
    [torch.enable_grad, watching, profiling, in_half_precision, differentiating_forwards],
    ids=lambda f: f.__name__,
)
def test_where_somebody_would_notice_they_are_dispatched(around, monkeypatch):
    pytest.importorskip("triton")
    with around():
        assert dispatched(lambda compose: compose(X, *PARAMETERS), monkeypatch) == 1


@pytest.mark.parametrize("kind", ["subclass", "negated", "vmap", "trace"])
def test_tensors_and_transforms_that_are_dispatched(kind, monkeypatch):
    pytest.importorskip("triton")

    def run(compose):
        with torch.no_grad():
            if kind == "subclass":
                compose(X.as_subclass(type("Mine", (torch.Tensor,), {})), *PARAMETERS)
            elif kind == "negated":
                x = torch.randn(3, 16, dtype=torch.complex64).conj().imag
                assert x.is_neg()
                compose(x, *PARAMETERS)
            elif kind == "vmap":
                torch.func.vmap(lambda x: compose(x, *PARAMETERS))(X[None])
            else:
                torch.jit.trace(lambda x: compose(x, *PARAMETERS), X, check_trace=False)

    assert dispatched(run, monkeypatch) == 1


def test_replaced_operators_are_called():
    pytest.importorskip("triton")
    kernels = implementation.load_kernels()
    mine = kernels._replace(linear=lambda *args, **kwargs: "mine")
    with torch.no_grad():
        assert mine.compose(half, X, *PARAMETERS) == "mine" and type(mine) is not type(kernels)
