"""Loops over codes and floats, compiled by Numba for the processor that runs them.

What torch does in five to ten passes over memory, one operation each, is one pass here. Numba
compiles a loop when it is first called, in about half a second, and keeps the machine code on the
disk for the next process. Every operation is an IEEE one of float32, none is fused or reordered:
the results are those of grid.py's torch code, bit for bit.

Arrays are C-contiguous: codes uint8, floats float32. `scale` is a grid whose entry [i, j] is for
rows i * block_rows on and columns j * block_cols on; the last blocks may be partial. Loops are over
whole rows and free of branches, which lets LLVM use vector instructions: scales are spread over a
row first, and integers are cast at every step as Numba would widen them to 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

U8, U16, U32, F32 = np.uint8, np.uint16, np.uint32, np.float32

#: All bits of a float32 but its sign.
_MAGNITUDE = U32(0x7FFFFFFF)
#: Beyond 2^23 float32 has no fractions: adding this rounds to nearest even, and leaves the integer
#: in the low bits in two's complement.
_ROUND = 1.5 * 2**23


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiled when first called; kept on the disk where there is a folder for that."""
    options: Any = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor a home to write to
        return njit(**options)(function)


def _bits_of(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda c, b, s, a: b.bitcast(a[0], ir.IntType(32))


def _float_of(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda c, b, s, a: b.bitcast(a[0], ir.FloatType())


_I32 = ir.IntType(32)
_16_FLOATS, _16_INTS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_I32, 16)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """The address of an array's element."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _splat_of(context: Any, row: Any, start: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, signature.args[0], args[0], args[1])
        none = ir.Constant(_16_FLOATS, ir.Undefined)
        first = builder.insert_element(none, args[2], ir.Constant(_I32, 0))
        same = ir.Constant(_16_INTS, [0] * 16)
        vector = builder.shuffle_vector(first, none, same)
        builder.store(vector, builder.bitcast(place, _16_FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(row, types.intp, types.float32), generate


def _largest_of(context: Any, row: Any, start: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _place(context, builder, signature.args[0], args[0], args[1])
        vector = builder.load(builder.bitcast(place, _16_INTS.as_pointer()), align=4)
        sizes = builder.and_(vector, ir.Constant(_16_INTS, [int(_MAGNITUDE)] * 16))
        kind = ir.FunctionType(_I32, [_16_INTS])
        reduce = builder.module.declare_intrinsic("llvm.vector.reduce.umax.v16i32", (), kind)
        return builder.call(reduce, [sizes])

    return types.uint32(row, types.intp), generate


#: The uint32 with the bits of a float32, and back.
_bits: Any = intrinsic(_bits_of)
_float: Any = intrinsic(_float_of)
#: `_splat16(row, start, value)`: 16 floats from `start` on become `value`. `_largest16(row,
#: start)`: of 16 floats, as uint32, the bits of the largest magnitude. LLVM makes vector
#: instructions of long loops, but not of loops as short as the groups of a format.
_splat16: Any = intrinsic(_splat_of)
_largest16: Any = intrinsic(_largest_of)


@_compiled
def _spread(scales: Floats, size: int, row: Floats) -> None:
    """Each scale to its `size` columns."""
    whole = row.shape[0] // size if size == 16 or size == 32 else 0
    for group in range(whole):
        for start in range(group * size, (group + 1) * size, 16):
            _splat16(row, start, scales[group])
    for group in range(whole, scales.shape[0]):
        row[group * size : min((group + 1) * size, row.shape[0])] = scales[group]


@_compiled
def _e4m3_value(code: Any) -> Any:
    """The float32 of an E4M3 code; of 0x7F and 0xFF NaN."""
    size = U32(U32(code) & U32(0x7F))
    shifted = U32(size << U32(20))
    value = _float(U32(shifted + U32(120 << 23)))
    subnormal = _float(U32(shifted + U32(121 << 23))) - F32(2.0**-6)
    value = subnormal if size < U32(8) else value
    value = F32(np.nan) if size == U32(0x7F) else value
    return _float(U32(_bits(value) | U32(U32(U32(code) & U32(0x80)) << U32(24))))


@_compiled
def _e4m3_code(value: Any) -> Any:
    """The E4M3 code nearest to a float32, a tie to the even one; beyond 448 that of 448."""
    size = min(abs(value), F32(448))
    # Below 2^-6 the steps are 2^-9, as those of float32 are from 2^14 on; above, of the 23 bits of
    # mantissa the first 3 are kept, and exponents count from 2^-7 instead of 2^-127.
    low = U32(_bits(size + F32(1.5 * 2**14)) & U32(15))
    bits = _bits(size)
    odd = U32(U32(bits >> U32(20)) & U32(1))
    high = U32(U32(U32(bits + U32((0x7FFFF - (120 << 23)) & 0xFFFFFFFF)) + odd) >> U32(20))
    code = low if size < F32(2.0**-6) else high
    return U8(U32(code | U32(U32(_bits(value) >> U32(24)) & U32(0x80))))


@_compiled
def _e2m1_value(code: Any) -> Any:
    """The float32 of an E2M1 code 0..15."""
    size = U32(U32(code) & U32(7))
    value = _float(U32(U32(size << U32(22)) + U32(126 << 23)))
    value = (value - F32(0.5)) * F32(2) if size < U32(2) else value
    return _float(U32(_bits(value) | U32(U32(U32(code) & U32(8)) << U32(28))))


@_compiled
def _e2m1_code(value: Any) -> Any:
    """The E2M1 code nearest to a float32, a tie to the even one; beyond 6 that of 6. -0.0 becomes
    0, and what is negative and rounds to zero -0."""
    size = min(abs(value), F32(6))
    # Below 1 the steps are 0.5, as those of float32 are from 2^22 on; above, one bit of mantissa is
    # kept, and exponents count from 2^0.
    low = U32(_bits(size + F32(1.5 * 2**22)) & U32(7))
    bits = _bits(size)
    odd = U32(U32(bits >> U32(22)) & U32(1))
    high = U32(U32(U32(bits + U32((0x1FFFFF - (126 << 23)) & 0xFFFFFFFF)) + odd) >> U32(22))
    code = low if size < F32(1) else high
    return U8(U32(code | U32(U32(value < F32(0)) << U32(3))))


@_compiled
def _integer(quotient: Any, least: int, most: int, zero: int) -> Any:
    """A float32, clamped and rounded to nearest even, plus `zero`: the low byte."""
    clamped = min(max(quotient, F32(least)), F32(most))
    return U8(_bits(clamped + F32(_ROUND + zero)))


@_compiled
def unpack(packed: Bytes, codes: Bytes) -> None:
    """Flat: two codes a byte, the first one low, to one code a byte."""
    pairs = codes.view(U16)
    for i in range(packed.shape[0]):
        pair = U16(packed[i])
        pairs[i] = U16(U16(pair | U16(pair << U16(4))) & U16(0x0F0F))


@_compiled
def pack(codes: Bytes, packed: Bytes) -> None:
    """Undoes `unpack`."""
    pairs = codes.view(U16)
    for i in range(packed.shape[0]):
        packed[i] = U8(U16(pairs[i] | U16(pairs[i] >> U16(4))))


@_compiled
def decode_e4m3(codes: Bytes, scale: Floats, block_rows: int, block_cols: int, out: Floats) -> None:
    """[rows, cols] codes times their scales."""
    factors = np.empty(out.shape[1], F32)
    for r in range(out.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, factors)
        source, target = codes[r], out[r]
        for i in range(target.shape[0]):
            target[i] = _e4m3_value(source[i]) * factors[i]


@_compiled
def decode_int8(codes: Bytes, scale: Floats, block_rows: int, block_cols: int, out: Floats) -> None:
    """[rows, cols] codes in two's complement times their scales."""
    factors = np.empty(out.shape[1], F32)
    for r in range(out.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, factors)
        source, target = codes[r], out[r]
        for i in range(target.shape[0]):
            target[i] = F32(np.int32(np.int8(source[i]))) * factors[i]


@_compiled
def decode_int4(codes: Bytes, scale: Floats, block_rows: int, block_cols: int, out: Floats) -> None:
    """Codes less 8, two a byte [rows, at least cols / 2], times their scales."""
    factors = np.empty(out.shape[1], F32)
    each = np.empty(2 * codes.shape[1], U8)
    for r in range(out.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, factors)
        unpack(codes[r], each)
        target = out[r]
        for i in range(target.shape[0]):
            target[i] = F32(np.int32(np.int32(each[i]) - np.int32(8))) * factors[i]


@_compiled
def decode_e2m1(codes: Bytes, scale: Floats, block_rows: int, block_cols: int, out: Floats) -> None:
    """Codes, two a byte [rows, cols / 2], times their scales."""
    factors = np.empty(out.shape[1], F32)
    each = np.empty(2 * codes.shape[1], U8)
    for r in range(out.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, factors)
        unpack(codes[r], each)
        target = out[r]
        for i in range(target.shape[0]):
            target[i] = _e2m1_value(each[i]) * factors[i]


@_compiled
def encode_e4m3(tile: Floats, scale: Floats, block_rows: int, block_cols: int, out: Bytes) -> None:
    """The codes nearest to [rows, cols] divided by their scales."""
    divisors = np.empty(tile.shape[1], F32)
    for r in range(tile.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, divisors)
        source, target = tile[r], out[r]
        for i in range(source.shape[0]):
            target[i] = _e4m3_code(source[i] / divisors[i])


@_compiled
def encode_int8(tile: Floats, scale: Floats, block_rows: int, block_cols: int, out: Bytes) -> None:
    """The integers -128..127 nearest to [rows, cols] divided by their scales."""
    divisors = np.empty(tile.shape[1], F32)
    for r in range(tile.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, divisors)
        source, target = tile[r], out[r]
        for i in range(source.shape[0]):
            target[i] = _integer(source[i] / divisors[i], -128, 127, 0)


@_compiled
def encode_int4(tile: Floats, scale: Floats, block_rows: int, block_cols: int, out: Bytes) -> None:
    """The integers -8..7 nearest to [rows, cols] divided by their scales, plus 8, two a byte; what
    a row of `out` has beyond them becomes 0."""
    divisors = np.empty(tile.shape[1], F32)
    each = np.zeros(2 * out.shape[1], U8)
    for r in range(tile.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, divisors)
        source = tile[r]
        for i in range(source.shape[0]):
            each[i] = _integer(source[i] / divisors[i], -8, 7, 8)
        pack(each, out[r])


@_compiled
def encode_e2m1(tile: Floats, scale: Floats, block_rows: int, block_cols: int, out: Bytes) -> None:
    """The codes nearest to [rows, cols] divided by their scales, two a byte."""
    divisors = np.empty(tile.shape[1], F32)
    each = np.empty(tile.shape[1], U8)
    for r in range(tile.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, divisors)
        source = tile[r]
        for i in range(source.shape[0]):
            each[i] = _e2m1_code(source[i] / divisors[i])
        pack(each, out[r])


@_compiled
def upcast_e2m1(codes: Bytes, scale: Floats, block_rows: int, block_cols: int, out: Bytes) -> None:
    """The E4M3 codes nearest to E2M1 codes, one a byte [rows, cols], times their scales."""
    factors = np.empty(out.shape[1], F32)
    for r in range(out.shape[0]):
        if r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols, factors)
        source, target = codes[r], out[r]
        for i in range(target.shape[0]):
            target[i] = _e4m3_code(_e2m1_value(source[i]) * factors[i])


@_compiled
def peaks(tile: Floats, block_rows: int, out: Floats) -> None:
    """[rows, cols] -> [ceil(rows / block_rows), cols]: the largest magnitude in each column of each
    run of rows; NaN counts as larger than all else."""
    bits, most = tile.view(U32), out.view(U32)
    for r in range(tile.shape[0]):
        source, target = bits[r], most[r // block_rows]
        if r % block_rows == 0:
            target[:] = U32(0)
        for i in range(source.shape[0]):
            target[i] = max(target[i], U32(source[i] & _MAGNITUDE))


@_compiled
def amax(tile: Floats, block_cols: int, out: Floats) -> None:
    """[rows, cols] -> [rows, ceil(cols / block_cols)]: the largest magnitude of each run of
    columns; NaN counts as larger than all else."""
    bits, most = tile.view(U32), out.view(U32)
    for r in range(tile.shape[0]):
        whole = tile.shape[1] // block_cols if block_cols == 16 or block_cols == 32 else 0
        for group in range(whole):
            largest = _largest16(bits[r], group * block_cols)
            if block_cols == 32:
                largest = max(largest, _largest16(bits[r], group * block_cols + 16))
            most[r, group] = largest
        for group in range(whole, out.shape[1]):
            part = bits[r, group * block_cols : min((group + 1) * block_cols, tile.shape[1])]
            largest = U32(0)
            for i in range(part.shape[0]):
                largest = max(largest, U32(part[i] & _MAGNITUDE))
            most[r, group] = largest


@_compiled
def largest_e4m3(codes: Bytes, scale: Floats, block_rows: int, block_cols: int) -> Any:
    """The bits of the largest magnitude of what `decode_e4m3` gives."""
    largest = U32(0)
    for r in range(codes.shape[0]):
        scales = scale[r // block_rows]
        for group in range(scales.shape[0]):
            stop = min((group + 1) * block_cols, codes.shape[1])
            part = codes[r, group * block_cols : stop]
            code = U8(0)
            for i in range(part.shape[0]):
                code = max(code, U8(part[i] & U8(0x7F)))
            product = _e4m3_value(code) * scales[group]
            largest = max(largest, U32(_bits(product) & _MAGNITUDE))
    return largest


@_compiled
def largest_e2m1(codes: Bytes, scale: Floats, block_rows: int, block_cols: int) -> Any:
    """The bits of the largest magnitude of what `decode_e2m1` gives."""
    each = np.empty(codes.shape[1], U8)
    groups = (2 * codes.shape[1] + block_cols - 1) // block_cols
    most = np.empty(groups, U8)
    largest = U32(0)
    for r in range(codes.shape[0]):
        source, scales = codes[r], scale[r // block_rows]
        for i in range(source.shape[0]):
            each[i] = max(U8(source[i] & U8(7)), U8(U8(source[i] >> U8(4)) & U8(7)))
        _group_maxima(each, block_cols // 2, most)
        for group in range(groups):
            product = _e2m1_value(most[group]) * scales[group]
            largest = max(largest, U32(_bits(product) & _MAGNITUDE))
    return largest


@_compiled
def _group_maxima(codes: Bytes, size: int, most: Bytes) -> None:
    """The largest of each run of `size` bytes, overwriting them: pairs first, which is fast where
    runs are short, as long as they are even."""
    count = codes.shape[0]
    while size % 2 == 0 and count % size == 0:
        size, count = size // 2, count // 2
        for i in range(count):
            codes[i] = max(codes[2 * i], codes[2 * i + 1])
    for group in range(most.shape[0]):
        largest = U8(0)
        for i in range(group * size, min((group + 1) * size, count)):
            largest = max(largest, codes[i])
        most[group] = largest


@_compiled
def nvfp4_scales(
    amax: Floats, whole: float, divides: bool, empty: int, local: Bytes, scale: Floats
) -> None:
    """Flat: of groups with these maxima the E4M3 scales, `empty` for what rounds to 0, and what
    codes are multiplied by; see `Nvfp4`."""
    factor, sixfold = F32(whole), F32(F32(whole) * F32(6))
    for i in range(amax.shape[0]):
        wanted = (amax[i] / F32(6)) * factor if divides else amax[i] / sixfold
        code = _e4m3_code(wanted)
        code = U8(empty) if code == U8(0) else code
        value = _e4m3_value(code)
        local[i] = code
        scale[i] = value / factor if divides else value * factor


@_compiled
def encode_bf16(values: Floats, out: npt.NDArray[np.uint16]) -> Any:
    """Flat: the bits of float32 rounded to BF16, a tie to the even one; returns those of the
    largest magnitude before, of NaN or infinity when it holds any."""
    largest = U32(0)
    for i in range(values.shape[0]):
        bits = _bits(values[i])
        odd = U32(U32(bits >> U32(16)) & U32(1))
        out[i] = U16(U32(U32(U32(bits + U32(0x7FFF)) + odd) >> U32(16)))
        largest = max(largest, U32(bits & _MAGNITUDE))
    return largest
