"""Device functions that the Triton kernels of every operation share: products, rounding, loads of features."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr):
    """Returns sums + a b, in the dtype of `sums`.

    The interpreter multiplies bfloat16 wrongly: it gets the operands in the dtype of the sums. Tensor cores truncate
    their sums: the compiler sums the three products of tf32x3 apart and adds the result to `sums`.
    """
    if INTERPRET:
        return tl.dot(a.to(sums.dtype), b.to(sums.dtype), sums, out_dtype=sums.dtype)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def multiply_rounded(x, y):
    """Returns x y, rounded: the compiler does not make it a part of a fused multiply-add."""
    if INTERPRET:
        return x * y
    return libdevice.mul_rn(x, y)


@triton.jit
def multiply_add(x, y, z):
    """Returns x y + z, rounded once."""
    if INTERPRET:
        return (x.to(tl.float64) * y + z).to(z.dtype)
    return tl.fma(x, y, z)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Returns x rounded to the nearest value of DTYPE, ties to even.

    The interpreter rounds fp32 to bfloat16 toward zero: there the bits are rounded by integer arithmetic.
    """
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        to_nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, to_nearest, bits | 0x00400000).to(tl.float32, bitcast=True).to(DTYPE)
    return x.to(DTYPE)


@triton.jit
def load_features(x, offsets, valid, step, width, first, FEATURES: tl.constexpr, DTYPE: tl.constexpr):
    """Returns FEATURES features, from `first` on, of the rows at `offsets`; zeros past `width` and in invalid rows."""
    feature = first + tl.arange(0, FEATURES)
    at = x + offsets[:, None] + feature.to(tl.int64)[None, :] * step
    return tl.load(at, mask=valid[:, None] & (feature < width)[None, :], other=0.0).to(DTYPE)
