"""Makes Triton's interpreter about three times as fast, with the same results.

A small kernel spends its time in Python: in describing the same shapes again, in broadcasting what has the shape
already, and in six operations on tensors to check an integer sum for overflow, of which the stock interpreter then says
nothing. Here such a sum is an error. Test: tests/kernels/test_interpreter.py. Tried with Triton 3.6 and 3.8.
"""

import functools
import inspect
from types import ModuleType

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interp
from triton.language.semantic import TritonSemantic


def quicken():
    """Call it when TRITON_INTERPRET is 1. What it replaces stays replaced in this process; again, it does nothing."""
    if TritonSemantic.binary_op_sanitize_overflow_impl is _check_overflow:
        return
    _describe_each_shape_once()
    _call_builtins_directly()
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
    TritonSemantic.binary_op_type_checking_impl = _brought_together(TritonSemantic.binary_op_type_checking_impl)
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    interp.np_erf_fp32 = interp.np_erf_fp64 = _erf
    if hasattr(interp, "_LangPatchScope"):
        _patch_language_once_a_launch()


def _describe_each_shape_once():
    stock_type, types, same_shapes = tl.block_type.__init__, {}, {}
    stock_tensor, shapes = tl.tensor.__init__, {}

    def block_type(self, element_ty, shape):
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        sizes = [size.value if type(size) is tl.constexpr else size for size in sizes]
        key = (element_ty.name, *sizes, *map(type, sizes))  # 16.0 is 16, and an error
        if key not in types:
            stock_type(self, element_ty, shape)
            self.shape = same_shapes.setdefault(tuple(sizes), self.shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])
        self.element_ty = element_ty

    def tensor(self, handle, type):
        if type.name not in shapes:
            stock_tensor(self, handle, type)
            shapes[type.name] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    stock_equal = tl.dtype.__eq__
    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    tl.dtype.__eq__ = lambda self, other: self is other or stock_equal(self, other)


def _call_builtins_directly():
    """Without the look whether a launch runs, which is so here, and without copying the keywords twice."""

    @functools.cache
    def direct(member):
        function = inspect.unwrap(member)

        def called(*args, **kwargs):
            kwargs["_semantic"] = interp.interpreter_semantic
            return function(*args, **kwargs)

        return called

    def patch_attr(obj, name, member, builder, scope):
        scope.set_attr(obj, name, direct(member))

    interp._patch_attr = patch_attr


def _broadcast(stock):
    def broadcast_impl_value(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return lhs, rhs
        return stock(self, lhs, rhs)

    return broadcast_impl_value


def _brought_together(stock):
    def binary_op_type_checking_impl(self, lhs, rhs, *flags, div_or_mod=False, **others):
        tensors = not div_or_mod and len(flags) < 4 and type(lhs) is type(rhs) is tl.tensor
        if tensors and lhs.type.name == rhs.type.name and not lhs.dtype.is_ptr():  # of one type and shape
            return lhs, rhs
        return stock(self, lhs, rhs, *flags, **({"div_or_mod": True} if div_or_mod else {}), **others)

    return binary_op_type_checking_impl


def _check_overflow(self, lhs, rhs, operation):
    bits = lhs.type.scalar.int_bitwidth
    if bits >= 64:
        return
    wide = getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply"}[operation.__name__])
    result = wide(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    low, high = lhs.type.scalar.get_int_min_value(), lhs.type.scalar.get_int_max_value()
    assert low <= result.min() and result.max() <= high, f"int{bits} overflow detected for {operation.__name__}"


def _erf(x):
    return torch.special.erf(torch.from_numpy(np.asarray(x, np.float64))).numpy().astype(x.dtype)


def _patch_language_once_a_launch():
    """The stock interpreter puts its functions into triton.language at every call of a device function.

    That is a third of the time that tests of kernels take. Here the first call in a launch does, and the launch undoes
    it; what is found out about modules, functions and types is kept.
    """
    stock, patched = interp._patch_lang, set()
    launch = None  # what the launch that runs has changed

    @functools.cache
    def builtins(module) -> list[tuple]:
        return [(name, member) for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]

    @functools.cache
    def languages(function) -> set[ModuleType]:
        return {value for value in function.__globals__.values() if value is tl or value is tl.core}

    def patch_builtin(module, builder, scope):
        for name, member in builtins(module):
            interp._patch_attr(module, name, member, builder, scope)

    def patch_lang(function):
        nonlocal launch
        if launch is not None:
            if not languages(function) <= patched:
                launch._changes += stock(function)._changes
                patched.update(languages(function))
            return None  # who calls a device function does not look at it
        launch = scope = stock(function)
        patched.update(languages(function))

        def restore():
            nonlocal launch
            interp._LangPatchScope.restore(scope)
            patched.clear()
            launch = None

        scope.restore = restore
        return scope

    interp._patch_builtin, interp._patch_lang = patch_builtin, patch_lang
    stock_type, types = interp._get_np_dtype, {}

    def numpy_type(dtype):
        name = str(dtype.scalar)
        if name not in types:
            types[name] = stock_type(dtype)
        return types[name]

    interp._get_np_dtype = numpy_type
