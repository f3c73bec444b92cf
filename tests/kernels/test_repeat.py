"""Host functions repeated from notes do what they do as written: kernels/repeat.py and kernels/direct.py."""

import gc
import threading
import types
import weakref

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from segmenter.kernels import direct, launch, repeat
from segmenter.kernels.launch import Plan, Tiles
from segmenter.kernels.operators import HOST_FUNCTIONS
from segmenter.kernels.repeat import Repeated
from tests.support.operator_samples import SAMPLES
from tests.support.parity import DEVICE


class Counted(Repeated):
    """Counts how often the host function runs as written."""

    def __init__(self, function):
        self.written = 0
        super().__init__(self._count)
        self._inner = function

    def _count(self, *arguments):
        self.written += 1
        return self._inner(*arguments)


def other_values(argument):
    """Other values at another address of the same alignment."""
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument * 0.9 if argument.is_floating_point() else 255 - argument


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", SAMPLES)
def test_repeated_is_as_written(name):
    """On other tensors, bit for bit, in memory of its own; and the host function runs once only."""
    torch.manual_seed(1)
    make, again = SAMPLES[name].make, Counted(HOST_FUNCTIONS[name])
    first = again(*make(torch.float32))
    kept = [x.clone() for x in tensors_of(first)]
    for _ in range(2):
        other = list(map(other_values, make(torch.float32)))
        found, want = again(*other), HOST_FUNCTIONS[name](*other)
        for x, y in zip(tensors_of(found), tensors_of(want), strict=True):
            assert x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))
    assert again.written == 1 and list(again.programs.values()) != [None]
    assert all(map(torch.equal, tensors_of(first), kept)), "an earlier result was written over"


def doubled(x, weight, flag, *rest):
    """A host function without a launch."""
    return launch.call(torch.mul, launch.rows_contiguous(x), 2 if flag else 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (torch.randn(3, 8), w, True),  # shape
        lambda x, w: (torch.randn(16, 4).T, w, True),  # strides
        lambda x, w: (x.double(), w, True),  # type
        lambda x, w: (torch.randn(65)[1:].view(4, 16), w, True),  # alignment
        lambda x, w: (x, w, False),  # another argument
        lambda x, w: (x, None, True),  # no tensor
        lambda x, w: (x, w, True, [1, 2]),  # a list
    ],
)
def test_what_the_key_holds(change):
    again, x, w = Counted(doubled), torch.randn(4, 16), torch.randn(16)
    again(x, w, True)
    assert again.written == 1
    other = change(x, w)
    for _ in range(2):
        assert torch.equal(again(*other), other[0] * (2 if other[2] else 3))
    assert again.written == 2 and len(again.programs) == 2


def test_precision_and_the_places_of_tensors_are_in_the_key():
    again, x = Counted(lambda a, b: launch.call(torch.clone, b if a is None else a)), torch.randn(4)
    assert torch.equal(again(x, None), x) and torch.equal(again(None, x), x)
    assert again.written == 2
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        again(x, None)
    finally:
        torch.set_float32_matmul_precision(before)
    assert again.written == 3


def test_arguments_that_share_memory():
    """Told apart by address; where that cannot be, as for one tensor twice, it runs as written each time."""
    again = Counted(lambda a, b: launch.call(torch.sub, a[..., 1:], b[..., 1:]))
    x = torch.arange(12.0).view(2, 6)
    for offset in (3, 2):
        a, b = x[:, :3], x[:, offset : offset + 3]
        assert torch.equal(again(a, b), a[:, 1:] - b[:, 1:])
    for _ in range(2):
        assert torch.equal(again(x, x), torch.zeros(2, 5))
    y = x + 1
    assert torch.equal(again(y, x), torch.ones(2, 5))


def test_memory_from_elsewhere_is_an_error():
    again = Repeated(lambda x: launch.call(torch.add, x, torch.ones(3)))
    for _ in range(2):
        with pytest.raises(AssertionError, match="no argument's and not from launch"):
            again(torch.ones(3))
    with pytest.raises(AssertionError, match="returned one of its arguments"):
        Repeated(lambda x: x.view(-1))(torch.ones(3))
    assert launch.current.notes is None


def test_errors_leave_no_notes():
    again = Counted(lambda x: launch.call(torch.linalg.cholesky, x))
    bad, good = -torch.eye(2), torch.eye(2)
    with pytest.raises(torch.linalg.LinAlgError):
        again(bad)
    assert launch.current.notes is None and not again.programs
    assert torch.equal(again(good), good)
    with pytest.raises(torch.linalg.LinAlgError):
        again(bad)
    assert again.written == 2


def test_memory_is_given_back_as_soon_as_nothing_needs_it():
    seen, alive = [], []

    def step(*xs):
        alive.append([ref() is not None for ref in seen])
        y = xs[0] + 1
        seen.append(weakref.ref(y))
        return y

    def host(x):
        a = launch.call(step, x)
        b = launch.call(step, a)
        c = launch.call(step, b, a)
        return launch.call(step, c)

    again = Repeated(host)
    again(torch.ones(2))
    del seen[:], alive[:]
    result = again(torch.ones(2))
    assert alive == [[], [True], [True, True], [False, False, True]] and torch.equal(result, torch.full((2,), 5.0))
    assert [ref() is not None for ref in seen] == [False, False, False, True]


def test_results_of_several_kinds():
    """A tuple, a view of what was made, and memory that is returned in another shape than it was allocated in."""
    again = Repeated(lambda x: (launch.call(torch.sort, x)[0], launch.empty((2, 3), x.dtype, x.device).view(6)))
    for _ in range(2):
        x = torch.randn(5)
        values, rest = again(x)
        assert torch.equal(values, x.sort().values) and rest.shape == (6,)
    part = Repeated(lambda x: launch.call(torch.add, x, 1)[1:].T)
    for _ in range(2):
        x = torch.randn(4, 3)
        assert torch.equal(part(x), (x + 1)[1:].T) and part(x).stride() == (1, 3)


def test_threads_do_not_share_notes():
    inside, go = threading.Event(), threading.Event()

    def slow(x):
        y = launch.call(torch.add, x, 1)
        inside.set()
        go.wait(20)
        return launch.call(torch.mul, y, 2)

    found = []
    thread = threading.Thread(target=lambda: found.append(Repeated(slow)(torch.ones(2))))
    thread.start()
    assert inside.wait(20)
    other = Repeated(lambda x: launch.call(torch.neg, x))
    assert torch.equal(other(torch.ones(2)), -torch.ones(2)) and len(next(iter(other.programs.values())).steps) == 1
    go.set()
    thread.join()
    assert torch.equal(found[0], torch.full((2,), 4.0))


def test_it_starts_over_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(repeat, "MAX_PROGRAMS", 3)
    again = Counted(doubled)
    for n in (1, 2, 3, 1, 2, 3, 4, 4, 1):
        again(torch.ones(n, 2), None, True)
    assert again.written == 5 and len(again.programs) == 2
    repeat.forget()
    assert not again.programs


def test_an_operator_within_an_operator_is_part_of_its_notes():
    inner = Counted(doubled)
    outer = Repeated(lambda x: inner(inner(x, None, True), None, True))
    for _ in range(3):
        assert torch.equal(outer(torch.ones(2, 2)), torch.full((2, 2), 4.0))
    assert inner.written == 2 and not inner.programs


# ---------------------------------------------------------------------------------------------------------------------
# Launching past Triton


class PyCUtensorMap:
    """In place of Triton's tensor map: equal for equal memory."""

    def __init__(self, descriptor):
        self.of = (descriptor.base.data_ptr(), *descriptor.shape, *descriptor.strides)

    def __eq__(self, other):
        return self.of == other.of


class Ending:
    def __init__(self, launched):
        self.launched = launched

    def __call__(self, *arguments):
        self.launched.append(arguments)


class FakeLauncher:
    """In place of Triton's launcher: 3.6 hands its C function all arguments flat, 3.8 as one list."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launched, nested, mapped):
        launcher = Ending(launched)  # no Python function, as Triton's is none

        def with_maps(*arguments):
            def expanded(values):
                for x in values:
                    if isinstance(x, TensorDescriptor):
                        yield from (PyCUtensorMap(x), *x.shape, *x.strides)
                    else:
                        yield x

            if nested:
                return launcher(*arguments[:-1], list(expanded(arguments[-1])))
            return launcher(*expanded(arguments))

        self.launch, self.nested = (with_maps if mapped else launcher), nested

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit_, *arguments):
        head = (x, y, z, stream, function, False, False, metadata, launch_metadata, enter, exit_)
        self.launch(*head, *((arguments,) if self.nested else arguments))


def a_plan(launched, nested=True, mapped=True):
    tiles = (Tiles((4, 8), (8, 1), (2, 8)) if mapped else None, None, None)
    plan = Plan(None, 7, tiles, (3, 0.5, 64, True, "ieee"), {"num_warps": 4})
    run = FakeLauncher(launched, nested, mapped)
    plan.compiled = types.SimpleNamespace(run=run, function=99, packed_metadata=(4, 1, 0))
    return plan


def as_integers(call):
    """A launch with addresses in place of tensors."""
    if isinstance(call, list | tuple):
        return [as_integers(x) for x in call]
    return call.data_ptr() if isinstance(call, torch.Tensor) else call


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_direct_launches_hand_over_what_triton_does(nested, mapped):
    launched = []
    plan, places = a_plan(launched, nested, mapped), [(1, 0), (0, 8), None]
    first = [torch.zeros(6), torch.zeros(4, 8)]
    launcher = direct.Launcher(plan, direct.tensors_at(first, places), places)
    assert not launched, "nothing runs while it is found out"
    for _ in range(2):
        for slots in ([torch.zeros(6), torch.zeros(4, 8)], first):
            launcher(slots, 17)
            tensors = direct.tensors_at(slots, places)
            assert tensors[1].data_ptr() == slots[0].data_ptr() + 8
            plan.compiled.run(*plan.grid, 17, 99, (4, 1, 0), None, None, None, *plan.arguments(tensors))
            ours, tritons = launched[-2:]
            assert as_integers(ours) == as_integers(tritons)
            assert not any(isinstance(x, torch.Tensor) for x in (ours[-1] if nested else ours))


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_direct_launches_keep_no_tensor_alive(nested, mapped):
    places = [(0, 0), (1, 0), None]
    slots = [torch.zeros(4, 8), torch.zeros(6)]
    launched = []
    launcher = direct.Launcher(a_plan(launched, nested, mapped), slots + [None], places)
    launcher(slots, 17)
    launched.clear()
    gone = [weakref.ref(x) for x in slots]
    del slots
    gc.collect()
    assert launcher.pointers and all(x() is None for x in gone)


def test_tensor_maps_are_made_once_an_address(monkeypatch):
    launched, made = [], []
    plan, places = a_plan(launched), [(0, 0), (1, 0), None]
    one, two = [torch.zeros(4, 8), torch.zeros(6)], [torch.zeros(4, 8), torch.zeros(6)]
    launcher = direct.Launcher(plan, direct.tensors_at(one, places), places)
    original = launcher._handed_over
    monkeypatch.setattr(launcher, "_handed_over", lambda tensors: made.append(tensors[0]) or original(tensors))
    for slots in (one, two, one, two, one):
        launcher(slots, 0)
    assert [x.data_ptr() for x in made] == [one[0].data_ptr(), two[0].data_ptr()]
    monkeypatch.setattr(direct, "MAX_MAPS", 2)
    others = [[torch.zeros(4, 8), torch.zeros(6)] for _ in range(3)]
    for slots in others:
        launcher(slots, 0)
    assert all(len(known) <= 2 for *_, known in launcher.maps)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: setattr(run, "global_scratch_size", 8),
        lambda run: delattr(run, "launch"),
        lambda run: setattr(run, "launch", lambda *arguments: None),  # no `launcher` that it ends in
    ],
)
def test_what_is_not_known_is_left_to_triton(spoil):
    plan, places = a_plan([]), [(0, 0), (1, 0), None]
    slots = [torch.zeros(4, 8), torch.zeros(6)]
    spoil(plan.compiled.run)
    with pytest.raises(direct.Unknown):
        direct.Launcher(plan, direct.tensors_at(slots, places), places)
    step = repeat._Launch(plan, places)
    ran = []
    plan_run = types.MethodType(lambda self, *tensors: ran.append(tensors), plan)
    step.plan = types.SimpleNamespace(run=plan_run, compiled=plan.compiled, grid=plan.grid, tiles=plan.tiles,
                                      arguments=plan.arguments)  # fmt: skip
    for _ in range(2):
        step(slots, 0)
    assert len(ran) == 2 and ran[0][0] is slots[0] and ran[0][2] is None
    assert step.direct is None and step.why_not_direct


def test_a_tensor_in_a_form_of_its_own_is_not_direct():
    """A descriptor that is handed over neither as a map nor as a pointer would keep its first address."""
    launched = []
    plan, places = a_plan(launched), [(0, 0), (1, 0), None]
    plan.compiled.run.launch = a_plan(launched, mapped=False).compiled.run.launch  # leaves descriptors as they are
    with pytest.raises(direct.Unknown, match="form of its own"):
        direct.Launcher(plan, [torch.zeros(4, 8), torch.zeros(6), None], places)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter has no stream")
def test_hooks_of_profilers_are_told():
    from triton import knobs

    hook = lambda *arguments: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert direct.stream(0) is None
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
