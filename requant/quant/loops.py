"""Loops over codes and floats, compiled by Numba for the processor that runs them.

What torch does in five to ten passes over memory, one operation each, is one pass here. Numba
compiles a loop when it is first called, in a second or two, and keeps the machine code on the disk
for the next process. Every operation is an IEEE one of float32, none is fused or reordered: the
results are those of grid.py's torch code, bit for bit.

A matrix is `(kind, stored, scale, zero, block_rows, block_cols)`: its rows as bytes [rows, bytes a
row], the kind of numbers that they are, and two grids of float32 whose entries [i, j] are for rows
i * block_rows on and columns j * block_cols on; the last blocks may be partial. Floats have no use
for scales, and only INT4 has one for zero points; an empty grid of them stands for 8. Rows are
decoded one at a time, into memory that stays in the processor's first cache, on their way to what
is asked for. FP4 codes whose scales are powers of two become other codes by tables.

Arrays are C-contiguous. Loops are over whole rows and free of branches, which lets LLVM use vector
instructions: scales are spread over a row first, and integers are cast at every step as Numba would
widen them to 64 bits. All is in one file: of what a function calls in others, Numba would not
notice that it changed since machine code was kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from requant.quant.bnb_maps import MAPS, middles

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Matrix = tuple[int, Bytes, Floats, Floats, int, int]

U8, U16, U32, U64, F32 = np.uint8, np.uint16, np.uint32, np.uint64, np.float32

#: Kinds of numbers: codes that scales multiply, and floats.
E4M3, INT8, INT4, E2M1, NF4, FP4, BF16, FP32 = range(8)

#: All bits of a float32 but its sign.
_MAGNITUDE = U32(0x7FFFFFFF)
#: Beyond 2^23 float32 has no fractions: adding this rounds to nearest even, and leaves the integer
#: in the low bits in two's complement.
_ROUND = 1.5 * 2**23
#: How many tables of 16 codes `_translate_row` keeps: 24 KiB with what they are for.
_TABLES_LOG2 = 10


def _pairs(values: tuple[float, ...]) -> npt.NDArray[np.uint64]:
    """Of each byte the values of its high nibble and then its low one, as 64 bits."""
    byte = np.arange(256)
    return np.array(values, F32)[np.stack((byte >> 4, byte & 15), 1)].view(U64)[:, 0]


def _codes(order: tuple[int, ...]) -> Bytes:
    """Of each byte, two ranks, the byte of their codes."""
    codes, byte = np.array(order, U8), np.arange(256)
    pairs: Bytes = codes[byte >> 4] << U8(4) | codes[byte & 15]
    return pairs


#: bitsandbytes' values, constants of the compiled code: what lies between two that follow each
#: other, and the codes that they have in this order.
_NF4_PAIRS, _FP4_PAIRS = _pairs(MAPS["nf4"]), _pairs(MAPS["fp4"])
(_NF4_MIDDLES, _), (_FP4_MIDDLES, _FP4_ORDER) = middles("nf4"), middles("fp4")
_FP4_CODES = _codes(_FP4_ORDER)


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


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_16_FLOATS, _16_INTS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_I32, 16)
_16_BYTES = ir.VectorType(ir.IntType(8), 16)


def _lanes(
    context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any = _16_FLOATS
) -> Any:
    """Where a vector, 16 floats unless told, begins at an array's element."""
    place = builder.gep(context.make_array(kind)(context, builder, array).data, [index])
    return builder.bitcast(place, vector.as_pointer())


def _splat_of(context: Any, row: Any, start: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _lanes(context, builder, signature.args[0], args[0], args[1])
        none = ir.Constant(_16_FLOATS, ir.Undefined)
        first = builder.insert_element(none, args[2], ir.Constant(_I32, 0))
        same = ir.Constant(_16_INTS, [0] * 16)
        vector = builder.shuffle_vector(first, none, same)
        builder.store(vector, lanes, align=4)
        return context.get_dummy_value()

    return types.void(row, types.intp, types.float32), generate


def _largest_of(length: int) -> Any:
    def typing(context: Any, row: Any, start: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits = row.dtype.bitwidth
            integer = ir.IntType(bits)
            vector = ir.VectorType(integer, length)
            lanes = _lanes(context, builder, signature.args[0], args[0], args[1], vector)
            found = builder.load(lanes, align=bits // 8)
            sizes = builder.and_(found, ir.Constant(vector, [(1 << bits - 1) - 1] * length))
            kind = ir.FunctionType(integer, [vector])
            name = f"llvm.vector.reduce.umax.v{length}i{bits}"
            return builder.call(builder.module.declare_intrinsic(name, (), kind), [sizes])

        return row.dtype(row, types.intp), generate

    return typing


def _add_of(context: Any, row: Any, start: Any, other: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, more = (_lanes(context, builder, signature.args[0], args[0], i) for i in args[1:])
        both = (builder.load(lanes, align=4) for lanes in (to, more))
        builder.store(builder.fadd(*both), to, align=4)
        return context.get_dummy_value()

    return types.void(row, types.intp, types.intp), generate


def _sum_of(context: Any, row: Any, start: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _lanes(context, builder, signature.args[0], args[0], args[1])
        found, count = builder.load(lanes, align=4), 16
        while count > 1:
            count //= 2
            indices = ir.VectorType(_I32, count)
            low, high = (
                builder.shuffle_vector(found, found, ir.Constant(indices, [*range(at, at + count)]))
                for at in (0, count)
            )
            found = builder.fadd(low, high)
        return builder.extract_element(found, ir.Constant(_I32, 0))

    return types.float32(row, types.intp), generate


def _look_up_of(context: Any, tables: Any, table: Any, row: Any, start: Any, out: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        entries, indices, found = (
            _lanes(context, builder, signature.args[array], args[array], args[index], _16_BYTES)
            for array, index in ((0, 1), (2, 3), (4, 3))
        )
        entries, indices = (builder.load(lanes, align=1) for lanes in (entries, indices))
        # LLVM makes one instruction of these where the processor has it.
        looked_up = ir.Constant(_16_BYTES, ir.Undefined)
        for lane in (ir.Constant(_I32, i) for i in range(16)):
            index = builder.zext(builder.extract_element(indices, lane), _I64)
            entry = builder.extract_element(entries, index)
            looked_up = builder.insert_element(looked_up, entry, lane)
        builder.store(looked_up, found, align=1)
        return context.get_dummy_value()

    return types.void(tables, types.intp, row, types.intp, out), generate


#: The uint32 with the bits of a float32, and back.
_bits: Any = intrinsic(_bits_of)
_float: Any = intrinsic(_float_of)
#: `_splat16(row, start, value)`: 16 floats from `start` on become `value`. `_largest8(row, start)`
#: and `_largest16`: of so many unsigned integers the largest, their first bit, a sign, aside.
#: `_add16(row, start, other)`: 16 floats from `other` on are added to those from `start` on.
#: `_sum16(row, start)`: the sum of 16 floats, by halves. `_look_up16(tables, table, row, start,
#: out)`: 16 bytes of `out` from `start` on become what the 16 bytes from `table` on have at the
#: indices 0..15 of `row`. LLVM makes vector instructions of long loops, but not of loops as short
#: as the groups of a format.
_splat16: Any = intrinsic(_splat_of)
_largest8: Any = intrinsic(_largest_of(8))
_largest16: Any = intrinsic(_largest_of(16))
_add16: Any = intrinsic(_add_of)
_sum16: Any = intrinsic(_sum_of)
_look_up16: Any = intrinsic(_look_up_of)


@_compiled
def _spread(scales: Floats, size: int, row: Floats) -> None:
    """Each scale to its `size` columns."""
    fast = size == 16 or size == 32 or size < 8
    whole = row.shape[0] // size if fast else 0
    if size < 8:
        for k in range(size):
            for group in range(whole):
                row[group * size + k] = scales[group]
    else:
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
def pack_high(codes: Bytes, packed: Bytes) -> None:
    """Flat: like `pack`, the first code high."""
    pairs = codes.view(U16)
    for i in range(packed.shape[0]):
        packed[i] = U8(U16(U16(pairs[i] << U16(4)) | U16(pairs[i] >> U16(8))))


@_compiled
def awq_words(codes: Bytes, words: npt.NDArray[np.uint32]) -> None:
    """Rows of codes, two a byte, to AWQ's words [cols, rows / 8]: of eight rows, row 2i + h is
    nibble 4h + i."""
    cols, eights = words.shape
    low, high = np.empty(codes.shape[1], U32), np.empty(codes.shape[1], U32)
    for eight in range(eights):
        low[:] = 0
        high[:] = 0
        for k in range(8):
            row, shift = codes[8 * eight + k], U32(4 * (4 * (k % 2) + k // 2))
            for i in range(row.shape[0]):
                low[i] |= U32(U32(row[i] & U8(15)) << shift)
                high[i] |= U32(U32(row[i] >> U8(4)) << shift)
        for i in range(cols // 2):
            words[2 * i, eight], words[2 * i + 1, eight] = low[i], high[i]
        if cols % 2:
            words[cols - 1, eight] = low[cols // 2]


@_compiled
def awq_codes(words: npt.NDArray[np.uint32], codes: Bytes) -> None:
    """Undoes `awq_words`; codes behind the last column are 0."""
    cols, eights = words.shape
    low, high = np.zeros(codes.shape[1], U32), np.zeros(codes.shape[1], U32)
    for eight in range(eights):
        for i in range(cols // 2):
            low[i], high[i] = words[2 * i, eight], words[2 * i + 1, eight]
        if cols % 2:
            low[cols // 2] = words[cols - 1, eight]
        for k in range(8):
            row, shift = codes[8 * eight + k], U32(4 * (4 * (k % 2) + k // 2))
            for i in range(row.shape[0]):
                first, second = U32(low[i] >> shift), U32(high[i] >> shift)
                row[i] = U8(U32(first & U32(15)) | U32(U32(second & U32(15)) << U32(4)))


def _ranks(middles: tuple[float, ...]) -> Any:
    """How many of these points lie below a float32."""

    @_compiled
    def rank(value: Any) -> Any:
        below = U32(0)
        for middle in middles:
            below = U32(below + U32(value > F32(middle)))
        return U8(below)

    return rank


_nf4_rank, _fp4_rank = _ranks(_NF4_MIDDLES), _ranks(_FP4_MIDDLES)


@_compiled
def _scratch(matrix: Matrix, cols: int) -> Any:
    """What `_row` needs: floats of a row, the factors and zero points of its codes, and room for
    codes that lie two in a byte."""
    zeros = np.full(cols if matrix[0] == INT4 else 0, 8, F32)
    return np.empty(cols, F32), np.empty(cols, F32), zeros, np.empty(2 * matrix[1].shape[1], U8)


@_compiled
def _row(matrix: Matrix, r: int, scratch: Any) -> Any:
    """Row r as floats: in the scratch, or where it lies if it is float32. Rows come in order, as
    factors are kept from one to the next."""
    kind, rows, scale, zero, block_rows, block_cols = matrix
    out, factors, zeros, codes = scratch
    stored = rows[r]
    if kind == FP32:
        return stored.view(F32)
    if kind == BF16:
        bits, wide = stored.view(U16), out.view(U32)
        for i in range(out.shape[0]):
            wide[i] = U32(U32(bits[i]) << U32(16))
        return out
    if r % block_rows == 0:
        _spread(scale[r // block_rows], block_cols, factors)
        if kind == INT4 and zero.size:
            _spread(zero[r // block_rows], block_cols, zeros)
    if kind == E4M3:
        for i in range(out.shape[0]):
            out[i] = _e4m3_value(stored[i]) * factors[i]
    elif kind == INT8:
        for i in range(out.shape[0]):
            out[i] = F32(np.int32(np.int8(stored[i]))) * factors[i]
    elif kind == INT4:
        unpack(stored, codes)
        for i in range(out.shape[0]):
            out[i] = (F32(np.int32(codes[i])) - zeros[i]) * factors[i]
    elif kind == NF4 or kind == FP4:
        values = _NF4_PAIRS if kind == NF4 else _FP4_PAIRS
        wide = out.view(U64)
        for i in range(wide.shape[0]):
            wide[i] = values[stored[i]]
        for i in range(out.shape[0]):
            out[i] *= factors[i]
    else:
        unpack(stored, codes)
        for i in range(out.shape[0]):
            out[i] = _e2m1_value(codes[i]) * factors[i]
    return out


@_compiled
def decode(matrix: Matrix, out: Floats) -> None:
    """The matrix, which is not float32 yet, as float32 [rows, cols]."""
    _, factors, zeros, codes = _scratch(matrix, out.shape[1])
    for r in range(out.shape[0]):
        _row(matrix, r, (out[r], factors, zeros, codes))


@_compiled
def _encode_row(kind: int, row: Floats, divisors: Floats, codes: Bytes, out: Bytes) -> None:
    """The codes nearest to a row divided by `divisors`, to one multiplied by them for NF4 and FP4.
    `codes` is overwritten with those that lie two in a byte; what `out` has beyond them becomes
    what it holds there."""
    if kind == E4M3:
        for i in range(row.shape[0]):
            out[i] = _e4m3_code(row[i] / divisors[i])
    elif kind == INT8:
        for i in range(row.shape[0]):
            out[i] = _integer(row[i] / divisors[i], -128, 127, 0)
    elif kind == INT4:
        for i in range(row.shape[0]):
            codes[i] = _integer(row[i] / divisors[i], -8, 7, 8)
        pack(codes, out)
    elif kind == NF4:
        for i in range(row.shape[0]):
            codes[i] = _nf4_rank(row[i] * divisors[i])
        pack_high(codes, out)
    elif kind == FP4:
        for i in range(row.shape[0]):
            codes[i] = _fp4_rank(row[i] * divisors[i])
        pack_high(codes, out)
        for i in range(out.shape[0]):
            out[i] = _FP4_CODES[out[i]]
    else:
        for i in range(row.shape[0]):
            codes[i] = _e2m1_code(row[i] / divisors[i])
        pack(codes, out)


@_compiled
def encode(
    matrix: Matrix,
    to: int,
    divisor: Floats,
    block_rows: int,
    block_cols: int,
    cols: int,
    out: Bytes,
) -> None:
    """The codes of the kind `to` nearest to [rows, cols] divided by other scales; 0 in what a row
    of `out` has beyond them."""
    by_tables = cols % 16 == block_cols % 16 == 0 and _has_tables(matrix, to)
    run = 16 if by_tables else 1
    scratch, tables = _scratch(matrix, cols), _tables(cols if by_tables else 0)
    divisors, codes = np.empty(cols // run, F32), np.zeros(2 * out.shape[1], U8)
    for r in range(out.shape[0]):
        if r % block_rows == 0:
            _spread(divisor[r // block_rows], block_cols // run, divisors)
        if by_tables:
            _translate_row(matrix, r, to, divisors, tables, codes, out[r])
        else:
            _encode_row(to, _row(matrix, r, scratch), divisors, codes, out[r])


@_compiled
def _has_tables(matrix: Matrix, to: int) -> Any:
    """Whether `_translate_row` knows the way: from E2M1 in blocks of 16 columns, whose scales are
    powers of two, and normal (none is 0)."""
    kind, _, scale, _, _, block_cols = matrix
    if kind != E2M1 or to > E2M1 or block_cols % 16:
        return False
    others, least = U32(0), U32(0xFFFFFFFF)
    for row in scale.view(U32):
        for i in range(row.shape[0]):
            others |= U32(row[i] & U32(0x807FFFFF))
            least = min(least, row[i])
    return others == U32(0) and least > U32(0)


@_compiled
def _tables(cols: int) -> Any:
    """What `_translate_row` needs: the factors of runs, unpacked codes, and tables beside the pairs
    of scales that they are for."""
    count = 1 << _TABLES_LOG2 if cols else 0
    factors, codes = np.empty(cols // 16, F32), np.empty(cols, U8)
    return factors, codes, np.zeros(count, U64), np.empty(16 * count, U8)


@_compiled
def _translate_row(
    matrix: Matrix, r: int, to: int, divisors: Floats, memory: Any, codes: Bytes, out: Bytes
) -> None:
    """What `_encode_row` does with `_row` r, for runs of 16 columns that share both scales, the
    second of which is in `divisors`. Pairs of scales are few where `_has_tables`, as the largest of
    a run has 8 values: for each a table of what the 16 codes become is made once, and kept."""
    _, rows, scale, _, block_rows, block_cols = matrix
    factors, indices, pairs, tables = memory
    if r % block_rows == 0:
        _spread(scale[r // block_rows], block_cols // 16, factors)
    unpack(rows[r], indices)
    packed = to == INT4 or to == E2M1
    target = codes if packed else out
    for run in range(factors.shape[0]):
        high, low = _bits(factors[run]), _bits(divisors[run])
        pair = U64(U64(U64(high) << U64(32)) | U64(low))
        mixed = U32(U32(low ^ U32(high >> U32(3))) * U32(0x9E3779B1))
        start = 16 * np.intp(U32(mixed >> U32(32 - _TABLES_LOG2)))
        if pairs[start // 16] != pair:
            pairs[start // 16] = pair
            _fill(to, packed, factors[run], divisors[run], tables[start : start + 16])
        _look_up16(tables, start, indices, 16 * run, target)
    if packed:
        pack(codes, out)


@_compiled
def _fill(to: int, packed: bool, factor: Any, divisor: Any, table: Bytes) -> None:
    """The codes of the kind `to`, one in a byte, that the 16 of E2M1 become."""
    values = np.empty(16, F32)
    for code in range(16):
        values[code] = _e2m1_value(code) * factor
    out = np.empty(8, U8) if packed else table
    _encode_row(to, values, np.full(16, divisor, F32), table, out)


@_compiled
def encode_with_zeros(
    matrix: Matrix, divisor: Floats, zero: Floats, size: int, first: bool, cols: int, out: Bytes
) -> None:
    """Like `encode` to INT4 in groups of `size` columns, each with a zero point 0..15, which is
    added to quotients `first`, or to what they are rounded to."""
    scratch = _scratch(matrix, cols)
    divisors, zeros = np.empty(cols, F32), np.empty(cols, F32)
    codes = np.zeros(2 * out.shape[1], U8)
    for r in range(out.shape[0]):
        _spread(divisor[r], size, divisors)
        _spread(zero[r], size, zeros)
        row = _row(matrix, r, scratch)
        if first:
            for i in range(cols):
                codes[i] = _integer(row[i] / divisors[i] + (zeros[i] - F32(8)), -8, 7, 8)
        else:
            for i in range(cols):
                quotient = max(row[i] / divisors[i], F32(0) - zeros[i])
                rounded = _bits(min(quotient, F32(15) - zeros[i]) + F32(_ROUND))
                codes[i] = U8(U32(rounded + _bits(zeros[i] + F32(_ROUND))))
        pack(codes, out[r])


@_compiled
def encode_bf16(matrix: Matrix, out: npt.NDArray[np.uint16]) -> Any:
    """The bits of [rows, cols] rounded to BF16, a tie to the even one; returns those of the
    largest magnitude before, of NaN or infinity when it holds any."""
    scratch = _scratch(matrix, out.shape[1])
    largest = U32(0)
    for r in range(out.shape[0]):
        row, target = _row(matrix, r, scratch), out[r]
        for i in range(target.shape[0]):
            bits = _bits(row[i])
            odd = U32(U32(bits >> U32(16)) & U32(1))
            target[i] = U16(U32(U32(U32(bits + U32(0x7FFF)) + odd) >> U32(16)))
            largest = max(largest, U32(bits & _MAGNITUDE))
    return largest


@_compiled
def differences(
    matrix: Matrix, other: Matrix, low: npt.NDArray[np.int32], high: npt.NDArray[np.int32]
) -> None:
    """By how many ulps the magnitudes of [rows, cols] exceed those of codes: the least and the most
    in each of the codes' blocks, or 0. Signs are the same."""
    _, codes, _, _, block_rows, block_cols = other
    cols = codes.shape[1]
    scratch, other_scratch = _scratch(matrix, cols), _scratch(other, cols)
    low[:] = 0
    high[:] = 0
    for r in range(codes.shape[0]):
        ours = _row(matrix, r, scratch).view(np.int32)
        theirs = _row(other, r, other_scratch).view(np.int32)
        least, most = low[r // block_rows], high[r // block_rows]
        for block in range(least.shape[0]):
            down, up = least[block], most[block]
            for i in range(block * block_cols, min((block + 1) * block_cols, cols)):
                ulps = np.int32(ours[i] - theirs[i])
                down, up = min(down, ulps), max(up, ulps)
            least[block], most[block] = down, up


@_compiled
def squared_errors(matrix: Matrix, other: Matrix, factor: Floats, cols: int, out: Floats) -> None:
    """Of each of the codes' runs of columns the sum of the squares of [rows, cols] less the codes,
    each times its run's `factor`; the columns that a short last run lacks are 0."""
    size = other[5]
    scratch, other_scratch = _scratch(matrix, cols), _scratch(other, cols)
    factors = np.empty(cols, F32)
    squares = np.zeros(out.shape[1] * size, F32)  # sums leave the zeros beyond the last column
    for r in range(out.shape[0]):
        _spread(factor[r], size, factors)
        ours, theirs = _row(matrix, r, scratch), _row(other, r, other_scratch)
        for i in range(cols):
            error = (theirs[i] - ours[i]) * factors[i]
            squares[i] = error * error
        for run in range(out.shape[1]):
            out[r, run] = _sum(squares, run * size, size)


@_compiled
def _sum(row: Floats, start: int, count: int) -> Any:
    """The sum of `count` floats, which are overwritten: the second half is added to the first until
    one is left."""
    while count > 1:
        if count == 16:
            return _sum16(row, start)
        half = (count + 1) // 2
        if count % 32 == 0:
            for i in range(start, start + half, 16):
                _add16(row, i, i + half)
        else:
            for i in range(start, start + count - half):
                row[i] += row[i + half]
        count = half
    return row[start]


@_compiled
def peaks(matrix: Matrix, block_rows: int, out: Floats) -> None:
    """[rows, cols] -> [ceil(rows / block_rows), cols]: the largest magnitude in each column of each
    run of rows; NaN counts as larger than all else."""
    scratch = _scratch(matrix, out.shape[1])
    most = out.view(U32)
    most[:] = 0
    for r in range(matrix[1].shape[0]):
        row, target = _row(matrix, r, scratch).view(U32), most[r // block_rows]
        for i in range(target.shape[0]):
            target[i] = max(target[i], U32(row[i] & _MAGNITUDE))


@_compiled
def ranges(matrix: Matrix, cols: int, size: int, low: Floats, high: Floats) -> None:
    """[rows, cols] -> twice [rows, ceil(cols / size)]: the least and the largest number of each run
    of columns; NaN is less or more than all else."""
    scratch = _scratch(matrix, cols)
    least, most = low.view(np.int32), high.view(np.int32)
    ordered = np.empty(cols, np.int32)
    for r in range(low.shape[0]):
        bits = _row(matrix, r, scratch).view(np.int32)
        for i in range(cols):
            ordered[i] = _in_order(bits[i])
        for run in range(low.shape[1]):
            part = ordered[run * size : min((run + 1) * size, cols)]
            down, up = part[0], part[0]
            for i in range(part.shape[0]):
                down, up = min(down, part[i]), max(up, part[i])
            least[r, run], most[r, run] = _in_order(down), _in_order(up)


@_compiled
def _in_order(bits: Any) -> Any:
    """The bits of a float32 as an integer that is in the order of floats, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_compiled
def amax(matrix: Matrix, cols: int, size: int, out: Floats) -> Any:
    """[rows, cols] -> [rows, ceil(cols / size)]: the largest magnitude of each run of columns; NaN
    counts as larger than all else. Returns the bits of the largest of all.

    Of codes that are in the order of their values, and share a scale, the largest is looked for
    before it is decoded.
    """
    kind, stored, scale, _, block_rows, block_cols = matrix
    most = out.view(U32)
    step = min(size, block_cols)
    ordered = kind == BF16 or kind == E4M3 or (kind == E2M1 and step % 2 == 0)
    if not ordered or max(size, block_cols) % step:
        scratch = _scratch(matrix, cols)
        for r in range(most.shape[0]):
            _amax_row(_row(matrix, r, scratch).view(U32), size, most[r])
        return _largest(most)
    codes = np.empty(stored.shape[1], U8)
    runs = (cols + step - 1) // step
    largest, largest_bits = np.empty(runs, U8), np.empty(runs, U16)
    factors, products = np.empty(runs, F32), np.empty(runs, F32)
    for r in range(most.shape[0]):
        row = stored[r]
        if kind != BF16 and r % block_rows == 0:
            _spread(scale[r // block_rows], block_cols // step, factors)
        if kind == BF16:
            _amax_row(row.view(U16), step, largest_bits)
            for run in range(runs):
                products[run] = _float(U32(U32(largest_bits[run]) << U32(16)))
        elif kind == E4M3:
            _amax_row(row, step, largest)
            for run in range(runs):
                products[run] = _e4m3_value(largest[run]) * factors[run]
        else:
            for i in range(row.shape[0]):
                codes[i] = max(U8(row[i] & U8(7)), U8(U8(row[i] >> U8(4)) & U8(7)))
            _amax_row(codes, step // 2, largest)
            for run in range(runs):
                products[run] = _e2m1_value(largest[run]) * factors[run]
        _amax_row(products.view(U32), size // step, most[r])
    return _largest(most)


@_compiled
def _largest(values: npt.NDArray[np.uint32]) -> Any:
    largest = U32(0)
    for row in values:
        for i in range(row.shape[0]):
            largest = max(largest, row[i])
    return largest


@_compiled
def _amax_row(row: Any, size: int, most: Any) -> None:
    """Of each run of `size` unsigned integers the largest, their first bit aside: a sign, without
    which the bits of floats are in the order of their magnitudes, NaN above all."""
    magnitude = ~row.dtype.type(0) >> row.dtype.type(1)
    if size == 1:
        for i in range(row.shape[0]):
            most[i] = row.dtype.type(row[i] & magnitude)
        return
    fast = size == 8 or size == 16 or size == 32
    whole = row.shape[0] // size if fast else 0
    for run in range(whole):
        if size == 8:
            most[run] = _largest8(row, run * size)
        elif size == 16:
            most[run] = _largest16(row, run * size)
        else:
            most[run] = max(_largest16(row, run * 32), _largest16(row, run * 32 + 16))
    for run in range(whole, most.shape[0]):
        part = row[run * size : min((run + 1) * size, row.shape[0])]
        largest = row.dtype.type(0)
        for i in range(part.shape[0]):
            largest = max(largest, row.dtype.type(part[i] & magnitude))
        most[run] = largest


@_compiled
def e8m0_values(exponents: Bytes, out: Floats) -> Any:
    """Flat: 2^(b - 127) of each byte; returns the largest byte: 255 stands for NaN."""
    largest = U8(0)
    for i in range(exponents.shape[0]):
        bits = U32(U32(exponents[i]) << U32(23))
        out[i] = _float(bits if bits else U32(1 << 22))  # 2^-127 is subnormal
        largest = max(largest, exponents[i])
    return largest


@_compiled
def e8m0_exponents(amax: Floats, round_up: int, less: int, out: Bytes) -> None:
    """Flat: the exponents of floats whose bits are raised first, less so much, 0..254."""
    bits, up, off = amax.view(np.int32), np.int32(round_up), np.int32(less)
    for i in range(amax.shape[0]):
        exponent = np.int32(np.int32(np.int32(bits[i] + up) >> np.int32(23)) - off)
        out[i] = U8(min(max(exponent, np.int32(0)), np.int32(254)))


@_compiled
def nvfp4_scales(
    amax: Floats, whole: float, divides: bool, least: float, local: Bytes, scale: Floats
) -> None:
    """Flat: of groups with these maxima the E4M3 scales, the one of `least` for what rounds to 0,
    and what codes are multiplied by; see `Nvfp4`."""
    factor, sixfold, none = F32(whole), F32(F32(whole) * F32(6)), _e4m3_code(F32(least))
    for i in range(amax.shape[0]):
        wanted = (amax[i] / F32(6)) * factor if divides else amax[i] / sixfold
        code = _e4m3_code(wanted)
        code = none if code == U8(0) else code
        value = _e4m3_value(code)
        local[i] = code
        scale[i] = value / factor if divides else value * factor
