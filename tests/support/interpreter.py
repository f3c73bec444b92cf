"""Makes bfloat16 and fma right in Triton's interpreter, for tests on a machine without a GPU.

The stock interpreter keeps bfloat16 as raw uint16: tl.dot multiplies the bit patterns (errors of 1e10), float32 ->
bfloat16 truncates instead of rounding to the nearest even, and subnormal values widen to zero. Sums and products are
of the bit patterns too, and there are no constants. tl.fma rounds the product.
tests/kernels/test_interpreter.py compares all of it with torch. Tried with Triton 3.6 and 3.8.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interp

from tests.support.quick_interpreter import quicken

_patched = False


def _to_fp32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interp.TensorHandle(bits.view(np.float32).reshape(handle.data.shape), tl.float32)


def _round_to_bf16(handle):
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).to(torch.bfloat16).view(torch.uint16).numpy()
    return interp.TensorHandle(rounded.reshape(handle.data.shape), tl.bfloat16)


def _converted(src, dst):
    """The conversion between float32 and bfloat16, or None if it is another one."""
    kinds = (src.dtype.scalar, dst.scalar)
    if kinds == (tl.float32, tl.bfloat16):
        return _round_to_bf16(src)
    if src.dtype.scalar.is_int() and dst.scalar == tl.bfloat16:
        return _round_to_bf16(interp.TensorHandle(src.data.astype(np.float32), tl.float32))
    return _to_fp32(src) if kinds == (tl.bfloat16, tl.float32) else None


def patch():
    """Call once TRITON_INTERPRET=1 is set and before the first launch. Calling it again does nothing."""
    global _patched
    if _patched:
        return
    _patched = True
    builder = interp.InterpreterBuilder
    stock_dot, stock_cast, stock_fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return stock_dot(self, _to_fp32(a), _to_fp32(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst):
        converted = _converted(src, dst)
        return stock_cast(self, src, dst) if converted is None else converted

    def create_fp_to_fp(self, src, dst, rounding_mode):
        converted = _converted(src, dst)
        return stock_fp_to_fp(self, src, dst, rounding_mode) if converted is None else converted

    def create_fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data + z.data  # holds the product of two float32 numbers exactly
        return interp.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def get_bf16(self, value):
        return _round_to_bf16(interp.TensorHandle(np.array([value], np.float32), tl.float32))

    def rounded(stock):
        def operation(self, lhs, rhs):
            y = stock(self, _to_fp32(lhs), _to_fp32(rhs))
            return _round_to_bf16(y) if lhs.dtype.scalar == tl.bfloat16 else y

        return operation

    for name in ("create_fadd", "create_fsub", "create_fmul"):
        setattr(builder, name, rounded(getattr(builder, name)))
    builder.create_fma, builder.get_bf16 = create_fma, get_bf16
    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst: self.cast_impl(src, dst))
    quicken()
