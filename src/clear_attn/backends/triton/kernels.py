"""The Triton kernels. Import this module only to compile or call them, because it imports triton.

All kernels read `KeyLists`. A program computes one tile of rows for one head. It loops over the blocks and then over
the single keys of the tile's lists, which have a bit per pair. The source tests the bits after the matrix product,
because the compiler would pack the results of an earlier test.

Scores are in units of log 2 for exp2: `scale` includes 1 / ln 2.
"""

import triton
import triton.language as tl

# The values of `clear_attn.core.key_lists`.
TILE_ROWS = tl.constexpr(128)
BLOCK_KEYS = tl.constexpr(64)
TILE_FIELDS = tl.constexpr(7)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The maximum before any score. It is finite, so that a difference of two maxima is not NaN.
LEAST = tl.constexpr(-1.0e30)


@triton.jit
def _places(pointer, rows, stride, BLOCK_D: tl.constexpr):
    """Return pointers `[n, BLOCK_D]` to rows by their positions. The stride is a multiple of 16.

    Products of 32 bits count 16 elements each, so they reach 128 GiB of half precision with fewer instructions than
    products of 64 bits, which positions of 64 bits have.
    """
    in_32_bits = (rows.to(tl.uint32) * (stride // 16)).to(tl.int64) * 16
    offsets = rows * stride if rows.dtype == tl.int64 else in_32_bits
    return pointer + offsets[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_rows(pointer, rows, stride, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Load rows `[n, BLOCK_D]` by their positions."""
    dims = tl.arange(0, BLOCK_D)
    places = _places(pointer, rows, stride, BLOCK_D)
    if MASK_ROWS:
        return tl.load(places, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(places)
    return tl.load(places, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, rows, stride, valid, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    places = _places(pointer, rows, stride, BLOCK_D)
    tl.store(places, values.to(pointer.dtype.element_ty), mask=valid[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _block(blocks, number, N: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Return the positions `[N]` of the keys in a block, or in a half or quarter of it."""
    return tl.load(blocks + number // BLOCK_PARTS) + number % BLOCK_PARTS * N + tl.arange(0, N)


@triton.jit
def _attended(bits, first, number, rows, M: tl.constexpr, N: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Return whether each pair `[M, N]` of a step attends."""
    quarter = tl.arange(0, 4)
    step = (first + number // BLOCK_PARTS) * (TILE_ROWS * 4)
    word = tl.load(bits + step + rows[:, None] * 4 + quarter[None, :]).to(tl.int32)
    if BLOCK_PARTS > 1:
        word = word >> (number % BLOCK_PARTS * (N // 4))
    group, side = tl.arange(0, N // 8), tl.arange(0, 2)
    bit = 2 * group[None, :, None, None] + side[None, None, None, :]
    return tl.reshape((word[:, None, :, None] >> bit) & 1, [M, N]) != 0


@triton.jit
def _softmax_step(
    scores, bias, keys, value, total, maximum, accumulator, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """Add one block of keys to the running sum, maximum and output."""
    if HAS_BIAS:
        scores = scores * scale + (tl.load(bias + keys) * LOG2_E)[None, :]
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
    else:
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, 1)
    accumulator = accumulator * correction[:, None]
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return total, new_maximum, accumulator


@triton.jit(do_not_specialize=["group"])
def forward(
    query,
    key,
    value,
    bias,
    output,
    lse,
    list_rows,
    list_tiles,
    list_blocks,
    list_keys,
    list_bits,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    output_batch,
    output_head,
    output_row,
    lse_batch,
    lse_head,
    bias_batch,
    shift,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the output and the log-sum-exp of one tile of queries; row r of the query is row r + shift of both."""
    tile, part = tl.program_id(0) // TILE_PARTS, tl.program_id(0) % TILE_PARTS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head_index = head // group
    key += batch * key_batch + key_head_index * key_head
    value += batch * value_batch + key_head_index * value_head
    bias += batch * bias_batch
    bit_rows = part * M + tl.arange(0, M)
    rows = tl.load(list_rows + tile * TILE_ROWS + bit_rows)
    valid = rows >= 0
    table = list_tiles + tile * TILE_FIELDS
    blocks, block_count = list_blocks + tl.load(table), tl.load(table + 2)
    keys, steps = list_keys + tl.load(table + 3).to(tl.int64) * BLOCK_KEYS, tl.load(table + 5)
    first_bits = tl.load(table + 6)
    queries = _load_rows(
        query + batch * query_batch + head * query_head, rows, query_row, valid, HEAD_DIM, BLOCK_D, True
    )
    total = tl.zeros([M], tl.float32)
    maximum = tl.full([M], LEAST, tl.float32)
    accumulator = tl.zeros([M, BLOCK_D], tl.float32)
    for number in tl.range(0, block_count * BLOCK_PARTS):
        columns = _block(blocks, number, N, BLOCK_PARTS)
        key_block = _load_rows(key, columns, key_row, valid, HEAD_DIM, BLOCK_D, False)
        scores = tl.dot(queries, tl.trans(key_block), input_precision=PRECISION)
        value_block = _load_rows(value, columns, value_row, valid, HEAD_DIM, BLOCK_D, False)
        total, maximum, accumulator = _softmax_step(
            scores, bias, columns, value_block, total, maximum, accumulator, scale, HAS_BIAS, PRECISION
        )
    for number in tl.range(0, steps * BLOCK_PARTS):
        columns = tl.load(keys + number * N + tl.arange(0, N))
        key_block = _load_rows(key, columns, key_row, valid, HEAD_DIM, BLOCK_D, False)
        scores = tl.dot(queries, tl.trans(key_block), input_precision=PRECISION)
        scores = tl.where(_attended(list_bits, first_bits, number, bit_rows, M, N, BLOCK_PARTS), scores, float("-inf"))
        value_block = _load_rows(value, columns, value_row, valid, HEAD_DIM, BLOCK_D, False)
        total, maximum, accumulator = _softmax_step(
            scores, bias, columns, value_block, total, maximum, accumulator, scale, HAS_BIAS, PRECISION
        )
    total = tl.where(valid, total, 1.0)
    output += batch * output_batch + head * output_head
    _store_rows(output, rows + shift, output_row, valid, accumulator / total[:, None], HEAD_DIM, BLOCK_D)
    places = lse + batch * lse_batch + head * lse_head + rows + shift
    tl.store(places, (maximum + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def _query_gradient_step(
    queries,
    upstream,
    key_block,
    value_block,
    bias,
    columns,
    bits,
    first_bits,
    number,
    bit_rows,
    lse,
    delta,
    accumulator,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SINGLE_KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the contribution of one block of keys to the gradient of the queries."""
    scores = tl.dot(queries, tl.trans(key_block), input_precision=PRECISION) * scale
    if HAS_BIAS:
        scores += (tl.load(bias + columns) * LOG2_E)[None, :]
    if SINGLE_KEYS:
        scores = tl.where(_attended(bits, first_bits, number, bit_rows, M, N, BLOCK_PARTS), scores, float("-inf"))
    weights = tl.exp2(scores - lse[:, None])
    weight_gradient = tl.dot(upstream, tl.trans(value_block), input_precision=PRECISION)
    score_gradient = weights * (weight_gradient - delta[:, None])
    return tl.dot(score_gradient.to(key_block.dtype), key_block, accumulator, input_precision=PRECISION)


@triton.jit(do_not_specialize=["group"])
def query_gradient(
    query,
    key,
    value,
    bias,
    output_gradient,
    lse,
    delta,
    gradient,
    list_rows,
    list_tiles,
    list_blocks,
    list_keys,
    list_bits,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    output_batch,
    output_head,
    output_row,
    gradient_batch,
    gradient_head,
    gradient_row,
    lse_batch,
    lse_head,
    bias_batch,
    shift,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of one tile of queries. Row r of the query is row r + shift of output, lse and delta."""
    tile, part = tl.program_id(0) // TILE_PARTS, tl.program_id(0) % TILE_PARTS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head_index = head // group
    key += batch * key_batch + key_head_index * key_head
    value += batch * value_batch + key_head_index * value_head
    bias += batch * bias_batch
    bit_rows = part * M + tl.arange(0, M)
    rows = tl.load(list_rows + tile * TILE_ROWS + bit_rows)
    valid = rows >= 0
    table = list_tiles + tile * TILE_FIELDS
    blocks, block_count = list_blocks + tl.load(table), tl.load(table + 2)
    keys, steps = list_keys + tl.load(table + 3).to(tl.int64) * BLOCK_KEYS, tl.load(table + 5)
    first_bits = tl.load(table + 6)
    queries = _load_rows(
        query + batch * query_batch + head * query_head, rows, query_row, valid, HEAD_DIM, BLOCK_D, True
    )
    output_gradient += batch * output_batch + head * output_head
    upstream = _load_rows(output_gradient, rows + shift, output_row, valid, HEAD_DIM, BLOCK_D, True)
    per_row = batch * lse_batch + head * lse_head + rows + shift
    row_lse = tl.load(lse + per_row, mask=valid, other=0.0) * LOG2_E
    row_delta = tl.load(delta + per_row, mask=valid, other=0.0)
    accumulator = tl.zeros([M, BLOCK_D], tl.float32)
    for number in tl.range(0, block_count * BLOCK_PARTS):
        columns = _block(blocks, number, N, BLOCK_PARTS)
        key_block = _load_rows(key, columns, key_row, valid, HEAD_DIM, BLOCK_D, False)
        value_block = _load_rows(value, columns, value_row, valid, HEAD_DIM, BLOCK_D, False)
        accumulator = _query_gradient_step(
            queries,
            upstream,
            key_block,
            value_block,
            bias,
            columns,
            list_bits,
            first_bits,
            number,
            bit_rows,
            row_lse,
            row_delta,
            accumulator,
            scale,
            M,
            N,
            BLOCK_PARTS,
            False,
            HAS_BIAS,
            PRECISION,
        )
    for number in tl.range(0, steps * BLOCK_PARTS):
        columns = tl.load(keys + number * N + tl.arange(0, N))
        key_block = _load_rows(key, columns, key_row, valid, HEAD_DIM, BLOCK_D, False)
        value_block = _load_rows(value, columns, value_row, valid, HEAD_DIM, BLOCK_D, False)
        accumulator = _query_gradient_step(
            queries,
            upstream,
            key_block,
            value_block,
            bias,
            columns,
            list_bits,
            first_bits,
            number,
            bit_rows,
            row_lse,
            row_delta,
            accumulator,
            scale,
            M,
            N,
            BLOCK_PARTS,
            True,
            HAS_BIAS,
            PRECISION,
        )
    gradient += batch * gradient_batch + head * gradient_head
    _store_rows(gradient, rows, gradient_row, valid, accumulator * (scale * LN_2), HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_step(
    keys,
    values,
    query_block,
    upstream,
    bias_row,
    lse,
    delta,
    bits,
    first_bits,
    number,
    bit_rows,
    valid_columns,
    key_gradient,
    value_gradient,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SINGLE_KEYS: tl.constexpr,
    CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the contribution of one block of queries to the gradients of keys and values, with keys as rows."""
    scores = tl.dot(keys, tl.trans(query_block), input_precision=PRECISION) * scale + bias_row[:, None]
    if SINGLE_KEYS:
        scores = tl.where(_attended(bits, first_bits, number, bit_rows, M, N, BLOCK_PARTS), scores, float("-inf"))
    if CUT:
        scores = tl.where(valid_columns[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - lse[None, :])
    value_gradient = tl.dot(weights.to(upstream.dtype), upstream, value_gradient, input_precision=PRECISION)
    weight_gradient = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
    score_gradient = weights * (weight_gradient - delta[None, :])
    key_gradient = tl.dot(score_gradient.to(query_block.dtype), query_block, key_gradient, input_precision=PRECISION)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=["group"])
def key_gradients(
    query,
    key,
    value,
    bias,
    output_gradient,
    lse,
    delta,
    key_gradient,
    value_gradient,
    list_rows,
    list_tiles,
    list_blocks,
    list_keys,
    list_bits,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    output_batch,
    output_head,
    output_row,
    gradient_batch,
    gradient_head,
    gradient_row,
    lse_batch,
    lse_head,
    bias_batch,
    shift,
    group,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of one tile of image keys and values, from the lists of the queries that attend to them."""
    tile, part = tl.program_id(0) // TILE_PARTS, tl.program_id(0) % TILE_PARTS
    key_head_index, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    bit_rows = part * M + tl.arange(0, M)
    rows = tl.load(list_rows + tile * TILE_ROWS + bit_rows)
    # In 64 bits: with products of 32 bits this kernel is slower on an H200, and spills more on sm_80.
    valid, wide_rows = rows >= 0, rows.to(tl.int64)
    table = list_tiles + tile * TILE_FIELDS
    blocks, block_count = list_blocks + tl.load(table), tl.load(table + 1)
    singles, steps = list_keys + tl.load(table + 3).to(tl.int64) * BLOCK_KEYS, tl.load(table + 4)
    first_bits = tl.load(table + 6)
    key += batch * key_batch + key_head_index * key_head
    value += batch * value_batch + key_head_index * value_head
    keys = _load_rows(key, wide_rows, key_row, valid, HEAD_DIM, BLOCK_D, True)
    values = _load_rows(value, wide_rows, value_row, valid, HEAD_DIM, BLOCK_D, True)
    bias_row = tl.zeros([M], tl.float32)
    if HAS_BIAS:
        bias_row += tl.load(bias + batch * bias_batch + rows, mask=valid, other=0.0) * LOG2_E
    key_sum = tl.zeros([M, BLOCK_D], tl.float32)
    value_sum = tl.zeros([M, BLOCK_D], tl.float32)
    for head in range(key_head_index * group, (key_head_index + 1) * group):
        of_query = query + batch * query_batch + head * query_head
        of_output = output_gradient + batch * output_batch + head * output_head
        of_row = batch * lse_batch + head * lse_head + shift
        for number in tl.range(0, block_count * BLOCK_PARTS):
            columns = _block(blocks, number, N, BLOCK_PARTS)
            query_block = _load_rows(of_query, columns.to(tl.int64), query_row, valid, HEAD_DIM, BLOCK_D, False)
            upstream = _load_rows(
                of_output, (columns + shift).to(tl.int64), output_row, valid, HEAD_DIM, BLOCK_D, False
            )
            key_sum, value_sum = _key_gradient_step(
                keys,
                values,
                query_block,
                upstream,
                bias_row,
                tl.load(lse + of_row + columns) * LOG2_E,
                tl.load(delta + of_row + columns),
                list_bits,
                first_bits,
                number,
                bit_rows,
                valid,
                key_sum,
                value_sum,
                scale,
                M,
                N,
                BLOCK_PARTS,
                False,
                False,
                PRECISION,
            )
        for number in tl.range(0, steps * BLOCK_PARTS):
            columns = tl.load(singles + number * N + tl.arange(0, N))
            query_block = _load_rows(of_query, columns.to(tl.int64), query_row, valid, HEAD_DIM, BLOCK_D, False)
            upstream = _load_rows(
                of_output, (columns + shift).to(tl.int64), output_row, valid, HEAD_DIM, BLOCK_D, False
            )
            key_sum, value_sum = _key_gradient_step(
                keys,
                values,
                query_block,
                upstream,
                bias_row,
                tl.load(lse + of_row + columns) * LOG2_E,
                tl.load(delta + of_row + columns),
                list_bits,
                first_bits,
                number,
                bit_rows,
                valid,
                key_sum,
                value_sum,
                scale,
                M,
                N,
                BLOCK_PARTS,
                True,
                False,
                PRECISION,
            )
    place = batch * gradient_batch + key_head_index * gradient_head
    _store_rows(key_gradient + place, wide_rows, gradient_row, valid, key_sum * (scale * LN_2), HEAD_DIM, BLOCK_D)
    _store_rows(value_gradient + place, wide_rows, gradient_row, valid, value_sum, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["group", "before", "image_keys", "shared", "first_query", "queries", "span"])
def shared_key_gradients(
    query,
    key,
    value,
    bias,
    output_gradient,
    lse,
    delta,
    key_parts,
    value_parts,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    output_batch,
    output_head,
    output_row,
    lse_batch,
    lse_head,
    bias_batch,
    shift,
    group,
    before,
    image_keys,
    shared,
    first_query,
    queries,
    span,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of one block of shared keys and values, summed over one span of image queries.

    Both results are float32 `[spans, batch, key heads, shared keys, head_dim]`.
    """
    blocks = (shared + TILE_ROWS - 1) // TILE_ROWS * TILE_PARTS
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key_head_index, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    own = block * M + tl.arange(0, M)
    valid = own < shared
    rows = tl.where(own < before, own, own + image_keys)
    key += batch * key_batch + key_head_index * key_head
    value += batch * value_batch + key_head_index * value_head
    keys = _load_rows(key, rows, key_row, valid, HEAD_DIM, BLOCK_D, True)
    values = _load_rows(value, rows, value_row, valid, HEAD_DIM, BLOCK_D, True)
    bias_row = tl.zeros([M], tl.float32)
    if HAS_BIAS:
        bias_row += tl.load(bias + batch * bias_batch + rows, mask=valid, other=0.0) * LOG2_E
    key_sum = tl.zeros([M, BLOCK_D], tl.float32)
    value_sum = tl.zeros([M, BLOCK_D], tl.float32)
    last = tl.minimum((part + 1) * span, queries)
    for head in range(key_head_index * group, (key_head_index + 1) * group):
        of_query = query + batch * query_batch + head * query_head
        of_output = output_gradient + batch * output_batch + head * output_head
        of_row = batch * lse_batch + head * lse_head + shift
        for start in tl.range(part * span, last, N):
            number = start + tl.arange(0, N)
            inside = number < last
            columns = first_query + tl.minimum(number, last - 1)  # loads without a mask are faster
            query_block = _load_rows(of_query, columns, query_row, inside, HEAD_DIM, BLOCK_D, False)
            upstream = _load_rows(of_output, columns + shift, output_row, inside, HEAD_DIM, BLOCK_D, False)
            key_sum, value_sum = _key_gradient_step(
                keys,
                values,
                query_block,
                upstream,
                bias_row,
                tl.load(lse + of_row + columns) * LOG2_E,
                tl.load(delta + of_row + columns),
                lse,
                0,
                0,
                own,
                inside,
                key_sum,
                value_sum,
                scale,
                M,
                N,
                BLOCK_PARTS,
                False,
                True,
                PRECISION,
            )
    head_part = (part.to(tl.int64) * tl.num_programs(2) + batch) * tl.num_programs(1) + key_head_index
    place = head_part * shared * HEAD_DIM
    _store_rows(key_parts + place, own, HEAD_DIM, valid, key_sum * (scale * LN_2), HEAD_DIM, BLOCK_D)
    _store_rows(value_parts + place, own, HEAD_DIM, valid, value_sum, HEAD_DIM, BLOCK_D)
