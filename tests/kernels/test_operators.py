"""What every operator of `torch.ops.segmenter` owes PyTorch: every rule for each of the samples, one an operator."""

import importlib
import io
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from segmenter.kernels import launch, operators, pixels_to_tokens, reference
from segmenter.kernels.launch import KernelError
from tests.support.layouts import LAYOUTS
from tests.support.operator_samples import BF16, FP32, SAMPLES, attention_args, cross_attention_args, operator
from tests.support.parity import DEVICE, assert_bitwise_equal, assert_parity, check_guards, guarded, randn

for path in (Path(__file__).parents[2] / "kernels").glob("*.py"):
    importlib.import_module(f"segmenter.kernels.{path.stem}")


MAPS = ("attention_rows", "attention_statistics", "attention_transposed")
FURTHER = ("_backward", "_lse", "_hidden")  # gradients and what is kept for them; others are compiled with theirs
every_operator = pytest.mark.parametrize("name", SAMPLES)
every_operator_in_time = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.more) if n.endswith(FURTHER) else n for n in SAMPLES]
)
every_differentiable_operator = pytest.mark.parametrize("name", [n for n, s in SAMPLES.items() if s.differentiable])


def definition(name):
    """The eager definition. Of attention, without the fused backends, which have no second derivative."""
    if name == "pixels_to_tokens":  # `reference` has it with the weights as they were before the normalisation
        return pixels_to_tokens._pixels_to_tokens_reference
    if not hasattr(reference, name):  # its formulas stand elsewhere
        return operators.REFERENCES[name]

    def call(*args):
        with sdpa_kernel(SDPBackend.MATH):
            return getattr(reference, name)(*args)

    return call


def public(name):
    elsewhere = {"attention_lse": "attention", "cross_attention": "attention", "layernorm_linear": "linear"}
    elsewhere |= {"windows_argmax": "upsample_argmax", "cross_attention_lse": "attention"}
    elsewhere |= {"layernorm_mlp_hidden": "layernorm_mlp"}
    elsewhere |= {"cross_attention_backward": "attention_backward", "layernorm_linear_backward": "linear_backward"}
    functions = importlib.import_module(f"segmenter.kernels.{elsewhere.get(name, name)}")
    if name.endswith("_lse"):
        function = getattr(functions, name.removesuffix("_lse"))
        return lambda *args: function(*args, return_lse=True)
    return getattr(functions, name)


def results(name, out, N):
    out = out if isinstance(out, tuple) else (out,)
    if SAMPLES[name].first:
        return out[:1]
    return (out[0], out[1][..., :N]) if SAMPLES[name].trimmed else out


def tensors(args):
    return [x for x in args if isinstance(x, torch.Tensor)]


def mapped(function, args):
    return tuple(function(x) if isinstance(x, torch.Tensor) else x for x in args)


def cast(args, dtype):
    """Floating-point tensors in another type."""
    return mapped(lambda t: t.to(dtype) if t.is_floating_point() else t, args)


def differentiable(args):
    return [t for t in tensors(args) if t.requires_grad]


def leaves(args):
    return mapped(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), args)


def traced_with_gradient(name):
    """Of gradients themselves nobody compiles the gradient, and it takes long."""
    return SAMPLES[name].differentiable and SAMPLES[name].traced and not name.endswith("_backward")


def test_every_operator_has_a_sample():
    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "segmenter::" in n}
    assert registered == set(SAMPLES)


# ---------------------------------------------------------------------------------------------------------------------
# What runs


@every_operator_in_time
def test_the_kernel_runs_and_writes_the_result(name, monkeypatch):
    """Not the reference: without the launches nothing is written."""
    args = SAMPLES[name].make(BF16)  # float32 products may be a library's
    runs, run = [], launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: runs.append(self.kernel) or run(self, *tensors))
    good = results(name, operator(name)(*args), 5)
    assert runs and all(t.isfinite().all() for t in good)
    monkeypatch.setattr(launch.Plan, "run", lambda self, *tensors: None)
    for got, want in zip(results(name, operator(name)(*args), 5), good, strict=True):
        assert got.isnan().any() if got.is_floating_point() else not torch.equal(got, want)


@every_operator_in_time
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_public_function_equals_definition(name, dtype):
    args = SAMPLES[name].make(dtype, N=17)
    ours = public(name)(*args)
    exact = definition(name)(*cast(args, torch.float64))
    eager = definition(name)(*args)
    for o, want, low in zip(*(results(name, r, 17) for r in (ours, exact, eager)), strict=True):
        if o.is_floating_point():
            luck = 2.0 if o.numel() < 64 else 1.0  # a norm of so few numbers is a matter of chance
            assert_parity(o, want, low, frobenius=luck * (1.5 if o.dtype == FP32 else 1.1), context=name)
        else:
            assert_bitwise_equal(o, want, name)


@every_operator_in_time
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout):
    """Every argument in that layout: the same result, nothing read or written outside, and strides as promised.

    In float32 and bfloat16 by turns, since interpreting takes long.
    """
    dtype = (FP32, BF16)[(list(SAMPLES).index(name) + list(LAYOUTS).index(layout)) % 2]
    args = SAMPLES[name].make(dtype, N=9)
    placed = mapped(lambda t: same_shape(LAYOUTS[layout](t), t), args)
    inputs = mapped(guarded, placed)
    out = as_tuple(operator(name)(*inputs))
    for x, original in zip(tensors(inputs), tensors(placed), strict=True):
        assert_bitwise_equal(x, original, "inputs are never written")
        check_guards(x, name)
    want = as_tuple(operator(name)(*mapped(torch.Tensor.contiguous, placed)))
    with FakeTensorMode() as mode:
        fake = as_tuple(operator(name)(*mapped(mode.from_tensor, placed)))
    for o, w, f in zip(out, want, fake, strict=True):
        if SAMPLES[name].bitwise:
            assert_bitwise_equal(o, w, f"{name} {dtype}")
        eps = torch.finfo(o.dtype).eps if o.is_floating_point() else 0.0
        torch.testing.assert_close(o, w, rtol=4 * eps, atol=4 * eps * w[w.isfinite()].abs().max().item())
        assert o.is_contiguous() and o.storage_offset() == 0
        assert (f.shape, f.stride(), f.dtype, f.device) == (o.shape, o.stride(), o.dtype, o.device)


def same_shape(placed, original):
    """A layout that had to change the shape (no dimension of size 1 for a huge stride) is left out."""
    return placed if placed.shape == original.shape else original


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


@every_operator
@pytest.mark.parametrize("B", [0, 1])
def test_empty_and_single(name, B):
    for N in (0, 1):
        if N == 0 and (name.startswith(("cross", "pixels_to_tokens")) or name in MAPS):
            continue  # no keys, no pixels
        args = SAMPLES[name].make(FP32, B=B, N=N)
        for o, want in zip(
            results(name, operator(name)(*args), N), results(name, definition(name)(*args), N), strict=True
        ):
            torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)


@every_operator
def test_meta_tensors(name):
    args = SAMPLES[name].make(FP32)
    meta = as_tuple(operator(name)(*mapped(lambda t: t.to("meta"), args)))
    assert [m.shape for m in meta] == [o.shape for o in as_tuple(operator(name)(*args))]


@every_operator
def test_flops(name):
    for B, N in ((2, 5), (3, 17)):
        with FlopCounterMode(display=False) as counter:
            operator(name)(*SAMPLES[name].make(FP32, B, N))
        assert counter.get_flop_counts()["Global"][getattr(torch.ops.segmenter, name)] == SAMPLES[name].flops(B, N)


@every_operator
def test_autocast(name):
    args = SAMPLES[name].make(FP32, N=17)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = results(name, public(name)(*args), 17)
        assert torch.is_autocast_enabled(DEVICE)
    assert out[0].dtype == SAMPLES[name].autocast
    for o, want in zip(out, results(name, definition(name)(*args), 17), strict=True):
        torch.testing.assert_close(o.float(), want.float(), rtol=0.05, atol=0.05 * want.abs().max().item())
        assert not torch.equal(o.float(), want.float()) or name in (
            "layernorm",
            "rotate",
            "windows_argmax",
            "queries_argmax",
            "upsample_cross_entropy",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@every_differentiable_operator
def test_gradients(name):
    """With respect to every tensor, for random upstream gradients, once and twice."""
    args = SAMPLES[name].make(FP32)

    def derivatives(function, dtype):
        inputs = leaves(cast(args, dtype))
        outs = results(name, function(*inputs), 5)
        upstream = [randn(*o.shape, seed=7 + i).to(dtype).requires_grad_() for i, o in enumerate(outs)]
        first = torch.autograd.grad(outs, differentiable(inputs), upstream, create_graph=True)
        total = sum((g * randn(*g.shape, seed=20 + i).to(dtype)).sum() for i, g in enumerate(first))
        second = torch.autograd.grad(total, [*differentiable(inputs), *upstream], allow_unused=True)
        return [*first, *(g for g in second if g is not None)]

    exact = derivatives(definition(name), torch.float64)
    ours = derivatives(operator(name), FP32)
    assert len(ours) == len(exact)
    for o, want in zip(ours, exact, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(o.double(), want, rtol=1e-4, atol=2e-5 * scale)
    assert any(g.abs().max() > 1e-3 for g in ours)


@every_differentiable_operator
def test_only_what_is_needed_is_differentiated(name):
    args = SAMPLES[name].make(FP32)
    for i, x in enumerate(args):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        inputs = [*args]
        inputs[i] = x.clone().requires_grad_()
        out = as_tuple(operator(name)(*inputs))[0]
        (ours,) = torch.autograd.grad(out.square().sum(), [inputs[i]], retain_graph=True)
        assert_bitwise_equal(ours, torch.autograd.grad(out.square().sum(), [inputs[i]])[0], "backward again")
        (want,) = torch.autograd.grad(as_tuple(definition(name)(*inputs))[0].square().sum(), [inputs[i]])
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert not as_tuple(operator(name)(*args))[0].requires_grad


@every_operator
def test_forward_mode_raises(name):
    args = SAMPLES[name].make(FP32)

    i = next(i for i, x in enumerate(args) if x.is_floating_point())

    def of_first(x):
        return as_tuple(public(name)(*args[:i], x, *args[i + 1 :]))[0]

    with pytest.raises(KernelError, match="no forward-mode derivative; use impl="):
        torch.func.jvp(of_first, (args[i],), (torch.ones_like(args[i]),))
    with pytest.raises(KernelError), torch.autograd.forward_ad.dual_level():
        of_first(torch.autograd.forward_ad.make_dual(args[i], torch.ones_like(args[i])))
    of_first(args[i])


# ---------------------------------------------------------------------------------------------------------------------
# Compilers


@every_operator_in_time
def test_opcheck(name):
    sample = SAMPLES[name]
    args = sample.make(FP32, N=3)
    torch.library.opcheck(operator(name), leaves(args) if traced_with_gradient(name) else args)


class Wrapped(torch.nn.Module):
    def __init__(self, name, others):
        super().__init__()
        self.function, self.others = public(name), others

    def forward(self, *varying):
        varying = iter(varying)
        args = [next(varying) if x is None else x for x in self.others]
        out = self.function(*args)
        return tuple(2 * t for t in as_tuple(out))


def split(name, args):
    """The module of an operator with its weights inside, and the arguments that vary in size."""
    vary = sorted(SAMPLES[name].batch_like + SAMPLES[name].classes_like)
    return Wrapped(name, [None if i in vary else x for i, x in enumerate(args)]), [args[i] for i in vary]


@every_operator_in_time
def test_compile_with_dynamic_shapes(name):
    """One graph for all sizes, forward and backward, and the same bits as without."""
    torch._dynamo.reset()
    make = SAMPLES[name].make
    module, _ = split(name, make(FP32))
    graphs = []
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counting, fullgraph=True, dynamic=True)
    for B, N in ((6, 5), (4, 9)):  # two sizes that are equal (3 channels!) would be taken for one
        _, varying = split(name, make(FP32, B, N))
        with_gradient = traced_with_gradient(name)
        inputs, again = (leaves(varying) if with_gradient else varying for _ in range(2))
        out, want = compiled(*inputs), module(*again)
        for o, w in zip(out, want, strict=True):
            assert_bitwise_equal(o, w)
        if with_gradient:
            first, second = differentiable(inputs)[0], differentiable(again)[0]
            ours, theirs = torch.autograd.grad(out[0].sum(), first), torch.autograd.grad(want[0].sum(), second)
            torch.testing.assert_close(ours[0], theirs[0])
        graphs.append(counting.frame_count)
    assert graphs[0] == graphs[1], "the second size compiled again"


@pytest.mark.more
@pytest.mark.skipif(DEVICE == "cpu" and not shutil.which("g++"), reason="inductor needs a C++ compiler on the CPU")
def test_inductor():
    torch._dynamo.reset()
    module, varying = split("attention", attention_args(FP32))
    strange = varying[0].transpose(0, 1).contiguous().transpose(0, 1)  # inductor may choose strides of its own
    compiled = torch.compile(lambda x: module(x + 1)[0].relu(), fullgraph=True)
    torch.testing.assert_close(compiled(strange), module(strange + 1)[0].relu())


@every_operator_in_time
def test_export_save_and_load(name):
    sample = SAMPLES[name]
    module, varying = split(name, sample.make(FP32, 2, 5))
    dynamic, vary = torch.export.Dim.DYNAMIC, sorted(sample.batch_like + sample.classes_like)
    dims = [{0: dynamic} if i in sample.classes_like else {0: dynamic, 1: dynamic} for i in vary]
    program = torch.export.export(module, tuple(varying), dynamic_shapes=(tuple(dims),))
    called = "attention" if name == "attention_half" else name  # which is for gradients
    assert f"segmenter.{called}.default" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B, N in ((2, 5), (3, 11)):
        _, varying = split(name, sample.make(FP32, B, N))
        for o, want in zip(loaded(*varying), module(*varying), strict=True):
            assert_bitwise_equal(o, want)


def test_scale_by_default_is_that_of_the_head():
    q, k, v, _ = cross_attention_args(FP32)
    cross_attention = public("cross_attention")
    assert_bitwise_equal(cross_attention(q, k, v), cross_attention(q, k, v, scale=1 / math.sqrt(8)))
