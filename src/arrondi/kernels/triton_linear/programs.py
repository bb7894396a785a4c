"""The programs that run on the GPU, in Triton. Imported only where Triton is there.

Owns: `stream` (one token: products and sums in float32), `tiles` (some tokens: decoded tiles on the tensor cores) and `decode` (the
weight in real numbers, for many tokens). All three read words as `words.py` lays them out, and decode in registers: an integer becomes a
float32 by writing its bits into the mantissa of a power of two and subtracting that, a small float by writing them into a float16, any
other value by a look-up.
"""

# Triton's own functions have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _integer(word, j: tl.constexpr, B: tl.constexpr, base: tl.constexpr):
    """Number j of a plane of B bits, less base: float32."""
    at: tl.constexpr = (j * B) % 32
    shift: tl.constexpr = at % 16
    mask: tl.constexpr = ((1 << B) - 1) << shift
    one: tl.constexpr = (150 - shift) << 23
    if at >= 16:
        word = word >> 16
    power: tl.constexpr = float((1 << (23 - shift)) + base)
    return ((word & mask) | one).to(tl.float32, bitcast=True) - power


@triton.jit
def _field(word, j: tl.constexpr, B: tl.constexpr):
    """Number j of a plane of B bits: int32."""
    at: tl.constexpr = (j * B) % 32
    mask: tl.constexpr = (1 << B) - 1
    return (word >> at) & mask


@triton.jit
def _value(
    j: tl.constexpr, w0, w1, w2, table, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    KIND: tl.constexpr, BASE: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What number j means before its scale, float32.

    KIND 0: an integer, less BASE. 1: a small float with MANTISSA bits, times UNIT. 2: an entry of `table` (pointers), times UNIT.
    """
    if KIND == 0:
        if B1 == 0:
            return _integer(w0, j, B0, BASE)
        elif B2 == 0:
            return _integer(w0, j, B0, 0) + _integer(w1, j, B1, BASE >> B0) * (1 << B0)
        else:
            low = _integer(w0, j, B0, 0) + _integer(w1, j, B1, 0) * (1 << B0)
            return low + _integer(w2, j, B2, BASE >> (B0 + B1)) * (1 << (B0 + B1))
    else:
        code = _field(w0, j, B0)
        if B1 > 0:
            code = code | (_field(w1, j, B1) << B0)
        if B2 > 0:
            code = code | (_field(w2, j, B2) << (B0 + B1))
        if KIND == 1:
            BITS: tl.constexpr = B0 + B1 + B2
            sign: tl.constexpr = 1 << (BITS - 1)
            half = ((code & sign) << (16 - BITS)) | ((code & (sign - 1)) << (10 - MANTISSA))
            return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * UNIT
        else:
            return tl.load(table + code).to(tl.float32) * UNIT


@triton.jit
def _scale(scale, place, outer, SCALE: tl.constexpr):
    """Scales as they are stored, float32. SCALE 0: a float. 1: the exponent of a power of two. 2: fp8_e4m3, times the outer scale."""
    found = tl.load(scale + place)
    if SCALE == 0:
        return found.to(tl.float32)
    elif SCALE == 1:
        exponent = found.to(tl.int32)
        bits = tl.where(exponent == 0, 0x400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        return bits.to(tl.float32, bitcast=True)
    else:
        code = found.to(tl.int32)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        half = tl.where((code & 0x7F) == 0x7F, 0x7E00, half)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (256.0 * outer)


@triton.jit
def stream(
    x, words, scale, zero, offset, outer, table, bias, y, partial, counter, N, K, C, G,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, KIND: tl.constexpr, BASE: tl.constexpr, MIDDLE: tl.constexpr,
    MANTISSA: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr, TALL: tl.constexpr, HEIGHT, WIDTH,
    RUN: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y (tokens, N): BN rows of the weight times one token, a share of the chunks in each of SPLIT programs.

    The last of them adds up what all have found, in their order, so that the result does not depend on who is last.
    """
    BITS: tl.constexpr = B0 + B1 + B2
    place, part, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = place * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, N - 1)
    lanes = tl.arange(0, L)
    x += token.to(tl.int64) * K
    tables = table + (safe // TALL * LEVELS)[:, None] if KIND == 2 else table
    grid = safe // HEIGHT * G
    words += safe.to(tl.int64)[:, None] * (C * BITS * L) + lanes[None, :]
    times = tl.load(outer).to(tl.float32) if SCALE == 2 else 1.0
    each = (C + SPLIT - 1) // SPLIT
    total = tl.zeros((BN, L), tl.float32)
    for c in range(part * each, tl.minimum(part * each + each, C)):
        start = c * (32 * L)
        chunk = words + c * (BITS * L)
        inner = tl.zeros((BN, L), tl.float32)
        sums = tl.zeros((L,), tl.float32)
        for j in tl.static_range(32):
            if (j * B0) % 32 == 0:
                w0 = tl.load(chunk + (j * B0 // 32) * L)
            if B1 > 0:
                if (j * B1) % 32 == 0:
                    w1 = tl.load(chunk + (B0 + j * B1 // 32) * L)
            else:
                w1 = w0
            if B2 > 0:
                if (j * B2) % 32 == 0:
                    w2 = tl.load(chunk + (B0 + B1 + j * B2 // 32) * L)
            else:
                w2 = w0
            columns = start + j * L + lanes
            if EVEN:
                some = tl.load(x + columns).to(tl.float32)
            else:
                some = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
            inner += _value(j, w0, w1, w2, tables, B0, B1, B2, KIND, BASE, MANTISSA, UNIT) * some[None, :]
            if ZERO or OFFSET:
                sums += some
            if (j + 1) % RUN == 0:
                at = grid + tl.minimum((start + (j + 1 - RUN) * L) // WIDTH, G - 1)
                size = _scale(scale, at, times, SCALE)
                if ZERO:
                    shift = (tl.load(zero + at).to(tl.int32) - MIDDLE).to(tl.float32) * -size
                    total += size[:, None] * inner + shift[:, None] * sums[None, :]
                elif OFFSET:
                    shift = tl.load(offset + at).to(tl.float32)
                    total += size[:, None] * inner + shift[:, None] * sums[None, :]
                else:
                    total += size[:, None] * inner
                inner = tl.zeros((BN, L), tl.float32)
                sums = tl.zeros((L,), tl.float32)
    found = tl.sum(total, axis=1)
    out = y + token.to(tl.int64) * N + rows
    added = tl.load(bias + safe).to(tl.float32) if BIAS else 0.0
    if SPLIT == 1:
        tl.store(out, (found + added).to(y.dtype.element_ty), mask=rows < N)
    else:
        partial += token * SPLIT * N
        tl.store(partial + part * N + rows, found, mask=rows < N)
        tl.debug_barrier()
        mine = counter + token * tl.num_programs(0) + place
        if tl.atomic_add(mine, 1) == SPLIT - 1:
            whole = tl.zeros((BN,), tl.float32)
            for other in tl.static_range(SPLIT):
                whole += tl.load(partial + other * N + safe, cache_modifier=".cg")
            tl.store(out, (whole + added).to(y.dtype.element_ty), mask=rows < N)
            tl.store(mine, 0)


@triton.jit
def _eight(chunk, h, first: tl.constexpr, B: tl.constexpr, i: tl.constexpr, L: tl.constexpr):
    """Words of numbers 8h … 8h + 7 of a plane of B bits that begins at word `first`; of 8 bits their word i."""
    if B == 8:
        return tl.load(chunk + (first + h * 2 + i) * L)
    elif B == 4:
        return tl.load(chunk + (first + h) * L)
    elif B == 2:
        return tl.load(chunk + (first + h // 2) * L) >> (h % 2 * 16)
    else:
        return tl.load(chunk + first * L) >> (h * 8)


@triton.jit
def tiles(
    x, words, scale, zero, offset, outer, table, bias, y, partial, counter, M, N, K, C, G,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, KIND: tl.constexpr, BASE: tl.constexpr, MIDDLE: tl.constexpr,
    MANTISSA: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr, TALL: tl.constexpr, HEIGHT, WIDTH,
    RUN: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y (M, N): BM tokens times BN rows. Codes less their zero point are exact in 16 bits; scales multiply float32 sums.

    Eight numbers of a chunk at a time (RUN is at most 8): a program with all of them takes half a minute to compile.
    """
    BITS: tl.constexpr = B0 + B1 + B2
    place, part, band = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = place * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, N - 1)
    tokens = band * BM + tl.arange(0, BM)
    lanes = tl.arange(0, L)
    x += tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * K
    tables = table + (safe // TALL * LEVELS)[:, None] if KIND == 2 else table
    grid = safe // HEIGHT * G
    words += safe.to(tl.int64)[:, None] * (C * BITS * L) + lanes[None, :]
    times = tl.load(outer).to(tl.float32) if SCALE == 2 else 1.0
    steps = (K + 8 * L - 1) // (8 * L)
    each = (steps + SPLIT - 1) // SPLIT
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(part * each, tl.minimum(part * each + each, steps)):
        start, h = step * (8 * L), step % 4
        chunk = words + (step // 4) * (BITS * L)
        inner = tl.zeros((BM, BN), tl.float32)
        for j in tl.static_range(8):
            if j * B0 % 32 == 0:
                w0 = _eight(chunk, h, 0, B0, j * B0 // 32, L)
            if j == 0:
                w1 = _eight(chunk, h, B0, B1, 0, L) if B1 > 0 else w0
                w2 = _eight(chunk, h, B0 + B1, B2, 0, L) if B2 > 0 else w0
            if j % RUN == 0:
                at = grid + tl.minimum((start + j * L) // WIDTH, G - 1)
                size = _scale(scale, at, times, SCALE)
                shift = size
                if ZERO:
                    shift = (tl.load(zero + at).to(tl.int32) - MIDDLE).to(tl.float32)
                if OFFSET:
                    shift = tl.load(offset + at).to(tl.float32)
            columns = start + j * L + lanes
            if EVEN:
                some = tl.load(x + columns[None, :])
            else:
                some = tl.load(x + columns[None, :], mask=columns[None, :] < K, other=0.0)
            values = _value(j, w0, w1, w2, tables, B0, B1, B2, KIND, BASE, MANTISSA, UNIT)
            if ZERO:
                values = values - shift[:, None]
            if OFFSET:
                values = values * size[:, None] + shift[:, None]
                total = tl.dot(some, tl.trans(values.to(some.dtype)), total)
            else:
                inner = tl.dot(some, tl.trans(values.to(some.dtype)), inner)
                if (j + 1) % RUN == 0:
                    total += inner * size[None, :]
                    inner = tl.zeros((BM, BN), tl.float32)
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    where = tokens.to(tl.int64)[:, None] * N + rows[None, :]
    added = tl.load(bias + safe).to(tl.float32)[None, :] if BIAS else 0.0
    if SPLIT == 1:
        tl.store(y + where, (total + added).to(y.dtype.element_ty), mask=inside)
    else:
        apart = M * N
        tl.store(partial + part * apart + where, total, mask=inside)
        tl.debug_barrier()
        mine = counter + band * tl.num_programs(0) + place
        if tl.atomic_add(mine, 1) == SPLIT - 1:
            whole = tl.zeros((BM, BN), tl.float32)
            for other in tl.static_range(SPLIT):
                whole += tl.load(partial + other * apart + where, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + where, (whole + added).to(y.dtype.element_ty), mask=inside)
            tl.store(mine, 0)


@triton.jit
def decode(
    words, scale, zero, offset, outer, table, out, first, N, K, C, G,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, KIND: tl.constexpr, BASE: tl.constexpr, MIDDLE: tl.constexpr,
    MANTISSA: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr, TALL: tl.constexpr, HEIGHT, WIDTH,
    RUN: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    L: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (rows, K): rows `first` to N - 1 of the weight, computed in float32 and rounded once."""
    BITS: tl.constexpr = B0 + B1 + B2
    place, c = tl.program_id(0), tl.program_id(1)
    here = place * BN + tl.arange(0, BN)
    rows = first + here
    safe = tl.minimum(rows, N - 1)
    lanes = tl.arange(0, L)
    tables = table + (safe // TALL * LEVELS)[:, None] if KIND == 2 else table
    grid = safe // HEIGHT * G
    start = c * (32 * L)
    chunk = words + safe.to(tl.int64)[:, None] * (C * BITS * L) + lanes[None, :] + c * (BITS * L)
    times = tl.load(outer).to(tl.float32) if SCALE == 2 else 1.0
    out += here.to(tl.int64)[:, None] * K
    for j in tl.static_range(32):
        if (j * B0) % 32 == 0:
            w0 = tl.load(chunk + (j * B0 // 32) * L)
        if B1 > 0:
            if (j * B1) % 32 == 0:
                w1 = tl.load(chunk + (B0 + j * B1 // 32) * L)
        else:
            w1 = w0
        if B2 > 0:
            if (j * B2) % 32 == 0:
                w2 = tl.load(chunk + (B0 + B1 + j * B2 // 32) * L)
        else:
            w2 = w0
        if j % RUN == 0:
            at = grid + tl.minimum((start + j * L) // WIDTH, G - 1)
            size = _scale(scale, at, times, SCALE)
            shift = size
            if ZERO:
                shift = (tl.load(zero + at).to(tl.int32) - MIDDLE).to(tl.float32)
            if OFFSET:
                shift = tl.load(offset + at).to(tl.float32)
        values = _value(j, w0, w1, w2, tables, B0, B1, B2, KIND, BASE, MANTISSA, UNIT)
        if ZERO:
            values = values - shift[:, None]
        values = values * size[:, None]
        if OFFSET:
            values = values + shift[:, None]
        columns = (start + j * L + lanes)[None, :]
        tl.store(out + columns, values.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (columns < K))
