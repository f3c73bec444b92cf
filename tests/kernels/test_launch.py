"""What lies between a call and a launch: plans, checks, devices, and rules about the source of every kernel."""

import ast
import contextlib
import inspect
import itertools
import types
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from segmenter.kernels import attention, launch
from segmenter.kernels.launch import KernelError, Plan, Tiles
from segmenter.kernels.repeat import Repeated
from tests.support.layouts import LAYOUTS

KERNEL_FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))


class FakeCompiled:
    """In place of Triton's CompiledKernel: `compiled[grid](*arguments)`."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((grid, arguments, options))


class FakeKernel(FakeCompiled):
    """In place of Triton's JITFunction: launching it returns the compiled kernel."""

    def __init__(self):
        super().__init__()
        self.compiled = FakeCompiled()

    def __getitem__(self, grid):
        run = super().__getitem__(grid)

        def compile_and_run(*arguments, **options):
            run(*arguments, **options)
            return self.compiled

        return compile_and_run


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_compiled_launches_get_the_arguments_of_the_first():
    """The same values in the same order, constexprs included, without the options; with their own call's tensors."""
    kernel = FakeKernel()
    tiles = (Tiles((4, 8), (8, 1), (2, 8)), None, None)
    plan = Plan(kernel, 7, tiles, (3, 0.5, 64, True, "ieee"), {"num_warps": 4, "num_stages": 2})
    first, second = ([torch.zeros(4, 8), torch.zeros(3), None] for _ in range(2))
    plan.run(*first)
    plan.run(*second)
    plan.run(*second)
    ((grid, arguments, options),) = kernel.calls
    assert grid == (7, 1, 1) and options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert isinstance(arguments[0], TensorDescriptor) and arguments[0].base is first[0]
    assert arguments[0].shape == [4, 8] and arguments[0].strides == [8, 1] and arguments[0].block_shape == [2, 8]
    assert arguments[1] is first[1] and arguments[2:] == (None, 3, 0.5, 64, True, "ieee")
    assert len(kernel.compiled.calls) == 2
    for grid, again, options in kernel.compiled.calls:
        assert grid == (7, 1, 1) and options == {}
        assert again[0].base is second[0] and again[1] is second[1]
        assert type(again[0]) is TensorDescriptor
        assert {**vars(again[0]), "base": None} == {**vars(arguments[0]), "base": None}
        assert again[2:] == arguments[2:]


def test_arguments_are_as_many_as_the_kernel_has_parameters():
    with launch.recorded("sm_90") as launches:
        for dtype in (torch.float32, torch.bfloat16):
            attention.attention(torch.zeros(2, 65, 3 * 64, dtype=dtype), 1, return_lse=True)
            attention.attention(torch.zeros(2, 65, 3 * 64, dtype=dtype), 1)
    assert len(launches) == 4
    for item in launches:
        arguments = item.plan.arguments(item.tensors)
        parameters = inspect.signature(item.plan.kernel.fn).parameters.values()
        assert len(arguments) == len(parameters)
        constexprs = [p.annotation is tl.constexpr for p in parameters]
        assert constexprs == sorted(constexprs), "constexprs come last"


def count_plans(monkeypatch):
    made = []
    original = attention._plan
    monkeypatch.setattr(attention, "_plan", lambda *args: made.append(args) or original(*args))
    return made


def test_the_second_call_reuses_the_plan(monkeypatch):
    made = count_plans(monkeypatch)
    for _ in range(3):
        attention.attention(torch.randn(1, 5, 48), 1)
    assert len(made) == 1
    attention.attention(torch.randn(1, 5, 48), 2)  # other heads
    attention.attention(torch.randn(2, 5, 48), 1)  # another shape
    attention.attention(torch.randn(1, 5, 48).half(), 1)  # another type
    attention.attention(torch.randn(1, 5, 48), 1, return_lse=True)
    assert len(made) == 5
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        attention.attention(torch.randn(1, 5, 48), 1)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(made) == 6


def test_each_layout_has_a_plan_of_its_own(monkeypatch):
    """Triton compiles other code for an address or stride that is no multiple of 16: the first call must not decide."""
    made = count_plans(monkeypatch)
    x = torch.randn(2, 5, 48)
    dense = attention.attention(x, 1)
    for name in ("offset_by_one", "row_padded", "packed_slice", "transposed", "contiguous"):
        assert torch.equal(attention.attention(LAYOUTS[name](x), 1), dense), name
    assert len(made) == 5


def test_scale_is_part_of_the_key():
    q = torch.randn(1, 5, 1, 16)
    results = [attention.cross_attention(q, q, q, scale=s) for s in (0.25, 1.0, 0.25)]
    assert torch.equal(results[0], results[2]) and not torch.allclose(results[0], results[1])


def test_a_grid_has_an_end():
    assert Plan(None, 2**31 - 1, (), (), {}).grid == (2**31 - 1, 1, 1)
    with pytest.raises(KernelError, match="2147483648 programs, more than 2147483647; split the batch"):
        Plan(None, 2**31, (), (), {})


def test_fits_descriptor():
    x = torch.zeros(2, 5, 24, dtype=torch.float16)
    fits = {name: launch.fits_descriptor(f(x)) for name, f in LAYOUTS.items() if name != "column_strided"}
    assert fits == {
        "contiguous": True, "packed_slice": True, "transposed": True, "row_padded": False, "offset_by_one": False,
        "expanded": False, "huge_stride": False,
    }  # fmt: skip
    assert not launch.fits_descriptor(x.as_strided((1, 5, 24), (2**40, 24, 1)))
    assert launch.fits_descriptor(x.as_strided((1, 5, 24), (2**38, 24, 1)))


def test_rows_contiguous_copies_only_if_it_must():
    x = torch.randn(2, 5, 24)
    for name, f in LAYOUTS.items():
        y = f(x)
        assert (launch.rows_contiguous(y) is y) == (name != "column_strided"), name
        assert launch.rows_contiguous(y).stride(-1) == 1 and torch.equal(launch.rows_contiguous(y), y)


# ---------------------------------------------------------------------------------------------------------------------
# Devices


class OnDevice:
    """Stands for a tensor on a GPU that this machine does not have."""

    is_cuda = True

    def __init__(self, index):
        self.device = torch.device("cuda", index)

    def get_device(self):
        return self.device.index


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_launches_on_the_device_of_the_tensors(monkeypatch, current, entered):
    devices = []

    @contextlib.contextmanager
    def device(index):
        devices.append(index)
        yield
        devices.append("left")

    kernel = FakeKernel()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: pytest.fail("the caller's device was changed"))
    Plan(kernel, 1, (None,), (), {}).run(OnDevice(1))
    assert devices == [*entered, *["left"] * len(entered)]
    assert len(kernel.calls) == 1


@pytest.mark.parametrize(("name", "works"), [("sm_75", False), ("sm_80", True), ("sm_120", True), ("gfx942", True)])
def test_capability(monkeypatch, name, works):
    monkeypatch.setattr(launch, "_device_architecture", lambda index: name)
    with (
        contextlib.nullcontext() if works else pytest.raises(KernelError, match="8.0 or newer, found sm_75; use impl=")
    ):
        launch.check_device(OnDevice(0), None, OnDevice(0))


@pytest.mark.parametrize(
    ("hip", "properties", "name"),
    [
        (None, {"major": 9, "minor": 0}, "sm_90"),
        (None, {"major": 12, "minor": 0}, "sm_120"),
        ("6.4", {"gcnArchName": "gfx942:sramecc+:xnack-"}, "gfx942"),
    ],
)
def test_architecture(monkeypatch, hip, properties, name):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(**properties))
    launch._device_architecture.cache_clear()
    assert launch.architecture(OnDevice(0)) == name
    launch._device_architecture.cache_clear()


def test_devices_that_do_not_do(monkeypatch):
    with pytest.raises(KernelError, match="one device, found cuda:0 and cuda:1"):
        launch.check_device(OnDevice(0), OnDevice(1))
    x = torch.zeros(1)
    with pytest.raises(KernelError, match="one device, found cpu and meta"):
        launch.check_device(x, None, x.to("meta"))
    with pytest.raises(KernelError, match="run on CUDA tensors .* got meta; move the tensors to the GPU or use impl="):
        launch.check_device(x.to("meta"))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(KernelError, match="or on CPU tensors with TRITON_INTERPRET=1.*got cpu"):
        launch.check_device(x)


def test_check_floats():
    launch.check_floats("x", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(
        KernelError, match="x must be one of bfloat16, float16, float32, got torch.int64; cast it or use"
    ):
        launch.check_floats("x", torch.zeros(1, dtype=torch.int64))
    with pytest.raises(KernelError, match="y must be one of float16, got torch.float32"):
        launch.check_floats("y", torch.zeros(1), (torch.float16,))


def test_dot_precision_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        found = {}
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            found[setting] = launch.dot_precision(torch.float32)
            assert launch.dot_precision(torch.float16) == launch.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == {"highest": "ieee", "high": "tf32", "medium": "tf32"}


# ---------------------------------------------------------------------------------------------------------------------
# Recording


def test_recording_decides_for_the_architecture_and_launches_nothing(monkeypatch):
    monkeypatch.setattr(Plan, "_run", lambda *args: pytest.fail("launched"))
    x = torch.zeros(2, 65, 3 * 64, dtype=torch.bfloat16)
    found = {}
    for architecture in ("sm_80", "sm_90"):
        with launch.recorded(architecture) as launches:
            assert launch.architecture(x) == architecture
            attention.attention(x, 1)
            attention.attention(x, 1)
        assert len(launches) == 2
        found[architecture] = [tiles is not None for tiles in launches[0].plan.tiles]
    assert any(found["sm_90"]) and not any(found["sm_80"])
    assert not any(one.programs for one in Repeated.everywhere), (
        "what was decided for another architecture must not be kept"
    )


def test_recording_ends_with_an_exception_and_nests():
    with launch.recorded("sm_80"):
        outer = launch._recording
        with pytest.raises(ZeroDivisionError), launch.recorded("sm_90"):
            _ = 1 / 0
        assert launch._recording is outer
    assert launch._recording is None
    x = torch.randn(1, 3, 24)
    assert attention.attention(x, 1).isfinite().all()  # launched again


# ---------------------------------------------------------------------------------------------------------------------
# The source of every kernel


def calls(path):
    """(dotted name of what is called, the call, names of the functions it is in)."""

    def walk(node, inside):
        if isinstance(node, ast.FunctionDef):
            inside = (*inside, node.name)
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node, inside
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), ())


ALL_CALLS = [(path.name, *found) for path in KERNEL_FILES for found in calls(path)]


def test_every_product_says_its_precision():
    """Without it tl.dot multiplies float32 in TF32."""
    products = [(file, node) for file, name, node, _ in ALL_CALLS if name in ("tl.dot", "tl.dot_scaled")]
    assert len(products) >= 4
    for file, node in products:
        assert "input_precision" in [k.arg for k in node.keywords], f"{file}:{node.lineno}"


def test_only_the_first_grid_axis_is_used():
    """The second and third end at 65,535 programs."""
    axes = [(file, node) for file, name, node, _ in ALL_CALLS if name in ("tl.program_id", "tl.num_programs")]
    assert axes
    for file, node in axes:
        assert [ast.unparse(a) for a in node.args] == ["0"] and not node.keywords, f"{file}:{node.lineno}"


def test_nothing_that_newer_triton_lacks_or_that_tunes_in_the_users_process():
    unwanted = ("make_block_ptr", "advance", "autotune", "heuristics")
    for path, node in itertools.chain.from_iterable(
        ((path, node) for node in ast.walk(ast.parse(path.read_text()))) for path in KERNEL_FILES
    ):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in unwanted, f"{path.name}:{node.lineno}: {name}"


def test_kernels_do_not_synchronise_or_change_the_device():
    unwanted = {"item", "tolist", "cpu", "numpy", "synchronize", "set_device", "nonzero"}
    for file, name, node, _ in ALL_CALLS:
        assert name.split(".")[-1] not in unwanted, f"{file}:{node.lineno}: {name}"


def test_outputs_are_allocated_where_tests_can_poison_them():
    """By torch.empty; tensor methods only in fake implementations. See `poisoned_outputs` in conftest.py."""
    for file, name, node, inside in ALL_CALLS:
        if name.split(".")[-1] in ("new_empty", "new_empty_strided"):
            assert any(function.endswith("_fake") for function in inside), f"{file}:{node.lineno}: {name}"
        # It keeps permuted strides, and a kernel's output is dense.
        assert name.split(".")[-1] != "empty_like", f"{file}:{node.lineno}: {name}"


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_kernels_import_only_what_they_may(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        for module in modules:
            top = module.split(".")[0]
            if top == "numpy" and path.stem in ("upsample_tiles", "canvas_axis", "reference_queries"):
                continue  # small tables, made on the host
            assert top in {"torch", "triton"} or module.startswith("segmenter.kernels") or top in STANDARD, module


STANDARD = {
    *("collections", "contextlib", "copy", "dataclasses", "functools", "math", "operator", "threading", "types"),
    *("typing", "warnings", "weakref"),
}
