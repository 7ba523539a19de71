"""Triton kernels of symmetric products. Imported where one is launched, tested or tuned, and only there."""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` as an object.
import triton
import triton.language as tl

# Of the second half of a split operand, as in `precision.SPLIT_SCALE`.
_SPLIT_SCALE = tl.constexpr(2048.0)


@triton.jit
def tile_of_triangle(number):
    """Row and column of the number-th tile of the lower triangle, counted along the rows."""
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded.
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def rounded_operand(x, PRECISION: tl.constexpr):
    """A tile of float32 as operand of a product."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "fp16":  # noqa: RET505 (Triton compiles the branch that is taken)
        return x.to(tl.float16)
    else:
        # The tensor cores cut the last 13 bits off.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + ((bits >> 13) & 1) + 0xFFF) & -8192
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def add_product(total, cross, a, b, PRECISION: tl.constexpr):
    """Total + a·bᵀ, and for split operands cross + 2048 times what `total` lacks."""
    if PRECISION == "fp16x3":
        a_high = a.to(tl.float16)
        a_low = ((a - a_high.to(tl.float32)) * _SPLIT_SCALE).to(tl.float16)
        b_high = b.to(tl.float16)
        b_low = ((b - b_high.to(tl.float32)) * _SPLIT_SCALE).to(tl.float16)
        total = tl.dot(a_high, tl.trans(b_high), total)
        cross = tl.dot(a_high, tl.trans(b_low), cross)
        cross = tl.dot(a_low, tl.trans(b_high), cross)
    elif PRECISION == "fp32":
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    else:
        a, b = rounded_operand(a, PRECISION), rounded_operand(b, PRECISION)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32")
    return total, cross


@triton.jit
def mean_of_diagonal(S, size, TILE: tl.constexpr):
    """Of one matrix."""
    trace = tl.zeros((TILE,), tl.float32)
    for start in range(0, size, TILE):
        place = start + tl.arange(0, TILE)
        trace += tl.load(S + place * (size + 1), mask=place < size, other=0.0)
    return tl.sum(trace) / size


@triton.jit
def shifted_back(total, S, factor, mean, offset, place, is_inside, on_diagonal):
    """A tile of T² from that of D², where T = D + μI, D = f·(S - mI) and μ = f·m + g."""
    part = factor * mean + offset
    if part != 0.0:
        total += (2.0 * part * factor) * tl.load(S + place, mask=is_inside, other=0.0)
        total = tl.where(on_diagonal, total + part * (part - 2.0 * factor * mean), total)
    return total


@triton.jit
def store_twice(out, result, rows, columns, size, is_on_diagonal):
    """Writes a tile of a symmetric matrix to its place and, mirrored, to that beyond the diagonal."""
    is_inside = (rows[:, None] < size) & (columns[None, :] < size)
    if is_on_diagonal:
        # The sums of a tile on the diagonal are as symmetric as the tensor cores make them.
        result = (result + tl.trans(result)) * 0.5
    tl.store(out + rows[:, None] * size + columns[None, :], result, mask=is_inside)
    if is_on_diagonal == 0:
        mirrored = columns[:, None] * size + rows[None, :]
        is_mirrored = (columns[:, None] < size) & (rows[None, :] < size)
        tl.store(out + mirrored, tl.trans(result), mask=is_mirrored)


# A loop over the addends that could be unrolled would be, and its loads would not fit the registers.
@triton.jit
def square_of_tile(
    S,
    rows,
    columns,
    size,
    mean,
    factor,
    IS_CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of D², D = f·(S - mI)."""
    inner = tl.arange(0, STEP)
    is_row, is_column = rows[:, None] < size, columns[:, None] < size
    total = tl.zeros((TILE, TILE), tl.float32)
    cross = total
    for start in range(0, size, STEP):
        k = start + inner
        is_inner = k[None, :] < size
        a = tl.load(S + rows[:, None] * size + k[None, :], mask=is_row & is_inner, other=0.0)
        b = tl.load(S + columns[:, None] * size + k[None, :], mask=is_column & is_inner, other=0.0)
        if IS_CENTRED:
            a = tl.where(rows[:, None] == k[None, :], a - mean, a)
            b = tl.where(columns[:, None] == k[None, :], b - mean, b)
        total, cross = add_product(total, cross, a * factor, b * factor, PRECISION)
    if PRECISION == "fp16x3":
        total += cross * (1.0 / _SPLIT_SCALE)
    return total


@triton.jit(
    do_not_specialize=[
        "num_addends",
        "has_weights",
        "has_scale",
        "has_factors",
        "has_offsets",
        "has_norms",
        "norm_stride",
    ]
)
def symmetric_square(
    out,
    S,
    addends,
    weights,
    scale,
    factors,
    offsets,
    norms,
    size,
    tiles_per_matrix,
    num_addends,
    addend_stride,
    norm_stride,
    has_weights,
    has_scale,
    has_factors,
    has_offsets,
    has_norms,
    alpha,
    beta,
    shift,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Out = scale·(alpha·T² + Σ beta·addend + shift·I) by one triangle of tiles, each stored twice.

    T = f·S + g·I. An operand that is rounded, not split, has the mean m of S's diagonal taken out before:
    T = D + μI with D = f·(S - mI) and μ = f·m + g, and T² = D² + 2μD + μ²I is put together here. The others
    have m = 0.
    """
    program = tl.program_id(0)
    block = (program // tiles_per_matrix).to(tl.int64)
    row, column = tile_of_triangle(program % tiles_per_matrix)
    begin = block * size * size
    S, addends = S + begin, addends + begin
    rows, columns = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)

    IS_CENTRED: tl.constexpr = PRECISION != "fp16x3" and PRECISION != "fp32"
    mean = 0.0
    if IS_CENTRED:
        mean = mean_of_diagonal(S, size, TILE)
    factor = tl.load(factors + block, mask=has_factors != 0, other=1.0)
    offset = tl.load(offsets + block, mask=has_offsets != 0, other=0.0)

    total = square_of_tile(S, rows, columns, size, mean, factor, IS_CENTRED, PRECISION, TILE, STEP)
    place = rows[:, None] * size + columns[None, :]
    is_inside = (rows[:, None] < size) & (columns[None, :] < size)
    on_diagonal = rows[:, None] == columns[None, :]
    total = shifted_back(total, S, factor, mean, offset, place, is_inside, on_diagonal)
    result = alpha * total
    for number in tl.range(num_addends, num_stages=1):
        weight = tl.load(weights + number, mask=has_weights != 0, other=beta)
        result += weight * tl.load(addends + place, mask=is_inside, other=0.0)
        addends += addend_stride
    result = tl.where(on_diagonal, result + shift, result)
    result *= tl.load(scale + block, mask=has_scale != 0, other=1.0)
    if has_norms != 0:
        part = tl.sum(tl.sum(tl.where(is_inside, result * result, 0.0), axis=1), axis=0)
        part *= tl.where(row == column, 1.0, 2.0)
        tl.store(norms + block * norm_stride + program % tiles_per_matrix, part)
    store_twice(out + begin, result, rows, columns, size, row == column)


@triton.jit
def place_of_column(k, num_inner, outer_stride, inner_stride, IS_NESTED: tl.constexpr):
    """Where the k-th column of an unfolding lies: those of a middle dimension are runs of `num_inner`."""
    if IS_NESTED:
        return (k // num_inner) * outer_stride + (k % num_inner) * inner_stride
    return k * inner_stride


@triton.jit
def outer_operand(G, rows, k, place, size, num_columns, row_stride):
    """A tile of an unfolding; halves are multiplied as they are, without an error."""
    is_inside = (rows[:, None] < size) & (k[None, :] < num_columns)
    return tl.load(G + rows[:, None] * row_stride + place[None, :], mask=is_inside, other=0.0)


@triton.jit
def accumulate_outer(
    factors,
    G,
    size,
    num_columns,
    num_inner,
    tiles_per_matrix,
    factor_stride,
    block_stride,
    row_stride,
    outer_stride,
    inner_stride,
    decay,
    weight,
    PRECISION: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_NESTED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """F ← decay·F + weight·GGᵀ by one triangle of tiles, into both triangles, or the packed upper one."""
    program = tl.program_id(0)
    block = (program // tiles_per_matrix).to(tl.int64)
    row, column = tile_of_triangle(program % tiles_per_matrix)
    factors, G = factors + block * factor_stride, G + block * block_stride
    rows, columns = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, STEP)
    total = tl.zeros((TILE, TILE), tl.float32)
    cross = total
    for start in range(0, num_columns, STEP):
        k = start + inner
        place = place_of_column(k, num_inner, outer_stride, inner_stride, IS_NESTED)
        a = outer_operand(G, rows, k, place, size, num_columns, row_stride)
        b = outer_operand(G, columns, k, place, size, num_columns, row_stride)
        total, cross = add_product(total, cross, a, b, PRECISION)
    is_inside = (rows[:, None] < size) & (columns[None, :] < size)
    if IS_PACKED:
        # Row by row of the upper triangle, so that the mirrored entry is the one that is stored.
        is_inside = is_inside & (rows[:, None] >= columns[None, :])
        place = columns[None, :] * (2 * size - columns[None, :] - 1) // 2 + rows[:, None]
        old = tl.load(factors + place, mask=is_inside, other=0.0)
        tl.store(factors + place, decay * old + weight * total, mask=is_inside)
    else:
        place = rows[:, None] * size + columns[None, :]
        old = tl.load(factors + place, mask=is_inside, other=0.0)
        result = decay * old + weight * total
        store_twice(factors, result, rows, columns, size, row == column)


@triton.jit
def sided_operand(x, PRECISION: tl.constexpr):
    """A tile as operand of `two_sided`; rounded to the nearest."""
    return rounded_operand(x.to(tl.float32), PRECISION)


@triton.jit
def two_sided(
    out,
    G,
    X,
    Y,
    num_rows,
    num_columns,
    tiles_per_block,
    block_stride,
    row_stride,
    column_stride,
    x_stride,
    x_row,
    x_column,
    y_stride,
    y_row,
    y_column,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """U = XᵀGY of each block; a tile of rows of XᵀG, WIDTH columns wide, never leaves the program."""
    program = tl.program_id(0)
    block = (program // tiles_per_block).to(tl.int64)
    G, X, Y = G + block * block_stride, X + block * x_stride, Y + block * y_stride
    out += block * num_rows * num_columns
    rows = (program % tiles_per_block) * TILE + tl.arange(0, TILE)
    wide, inner = tl.arange(0, WIDTH), tl.arange(0, STEP)
    is_row, is_wide = rows[:, None] < num_rows, wide < num_columns
    half = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(0, num_rows, STEP):
        i = start + inner
        # Of X a column is needed as a row.
        x = tl.load(
            X + i[None, :] * x_row + rows[:, None] * x_column,
            mask=is_row & (i[None, :] < num_rows),
            other=0.0,
        )
        g = tl.load(
            G + i[:, None] * row_stride + wide[None, :] * column_stride,
            mask=(i[:, None] < num_rows) & is_wide[None, :],
            other=0.0,
        )
        a, b = sided_operand(x, PRECISION), sided_operand(g, PRECISION)
        half = tl.dot(a, b, half, input_precision="tf32")
    left = sided_operand(half, PRECISION)
    for start in range(0, num_columns, STEP):
        j = start + inner
        is_inside = j[None, :] < num_columns
        y = tl.load(
            Y + wide[:, None] * y_row + j[None, :] * y_column,
            mask=is_wide[:, None] & is_inside,
            other=0.0,
        )
        result = tl.dot(left, sided_operand(y, PRECISION), input_precision="tf32")
        tl.store(out + rows[:, None] * num_columns + j[None, :], result, mask=is_row & is_inside)
