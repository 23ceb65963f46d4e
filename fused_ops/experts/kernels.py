"""Triton kernels of the experts: the choice, where rows lie, SwiGLU with weights, and the sum over a token's experts.

Each program has whole tokens or whole rows, so that a row's numbers depend on no other row.
"""

from fused_ops.launch.optional_triton import tl, triton


@triton.jit
def expert_choose_kernel(
    logits_ptr, probability_ptr, expert_ptr, weight_ptr, counts_ptr, near_ties_ptr, segment_ptr, num_tokens, num_experts, near,
    TOP_K: tl.constexpr, NORMALISED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Choose the experts of some tokens, and count how many of these each expert has."""
    o_token, o_expert, o_k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, BK)
    m_token, m_expert = o_token < num_tokens, o_expert < num_experts
    at = o_token.to(tl.int64)[:, None] * num_experts + o_expert[None, :]
    mask = m_token[:, None] & m_expert[None, :]
    b_logits = tl.load(logits_ptr + at, mask, float("-inf")).to(tl.float32)
    b_logits = tl.where(m_token[:, None], b_logits, 0.0)
    b_p = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
    b_total = tl.sum(b_p, 1)
    b_p = b_p / b_total[:, None]
    tl.store(probability_ptr + at, b_p, mask)
    # A token of NaN has the first experts.
    b_score = tl.where((b_total == b_total)[:, None], b_p, -o_expert.to(tl.float32)[None, :])
    b_score = tl.where(m_expert[None, :], b_score, float("-inf"))
    b_best = tl.max(b_score, 1)
    b_weights, b_chosen, b_all = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.int32), tl.zeros([BT, BE], tl.int32)
    for k in tl.static_range(TOP_K):
        b_best = tl.max(b_score, 1)
        b_first = tl.min(tl.where(b_score == b_best[:, None], o_expert[None, :], BE), 1)
        b_is = o_expert[None, :] == b_first[:, None]
        b_weight = tl.sum(tl.where(b_is, b_p, 0.0), 1)
        b_weights = tl.where(o_k[None, :] == k, b_weight[:, None], b_weights)
        b_chosen = tl.where(o_k[None, :] == k, b_first[:, None], b_chosen)
        b_score = tl.where(b_is, float("-inf"), b_score)
        b_all += (b_is & m_token[:, None]).to(tl.int32)
    if NORMALISED:
        b_weights = b_weights / tl.sum(b_weights, 1)[:, None]
    to = o_token.to(tl.int64)[:, None] * TOP_K + o_k[None, :]
    mask = m_token[:, None] & (o_k < TOP_K)[None, :]
    tl.store(expert_ptr + to, b_chosen, mask)
    tl.store(weight_ptr + to, b_weights, mask)
    tl.store(counts_ptr + tl.program_id(0) * BE + o_expert, tl.sum(b_all, 0))
    if near_ties_ptr is not None:
        b_near = m_token & (b_best - tl.max(b_score, 1) < near)
        b_segment = tl.load(segment_ptr + o_token, b_near, 0)
        tl.atomic_add(near_ties_ptr + b_segment, b_near.to(tl.int64), b_near)  # of integers: the order does not matter


@triton.jit
def expert_grad_choice_kernel(
    d_weight_ptr, place_ptr, expert_ptr, weight_ptr, probability_ptr, out_ptr, num_tokens, num_experts,
    TOP_K: tl.constexpr, NORMALISED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    o_token, o_expert = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE)
    m_token = o_token < num_tokens
    at, mask = o_token.to(tl.int64)[:, None] * num_experts + o_expert[None, :], m_token[:, None] & (o_expert < num_experts)[None, :]
    b_p, b_dp = tl.zeros([BT, BE], tl.float32), tl.zeros([BT, BE], tl.float32)
    for k in tl.static_range(TOP_K):
        o_k = o_token.to(tl.int64) * TOP_K + k
        b_is = o_expert[None, :] == tl.load(expert_ptr + o_k, m_token, 0)[:, None]
        b_row = tl.load(place_ptr + o_k, m_token, -1)
        b_d_weight = tl.load(d_weight_ptr + b_row, b_row >= 0, 0.0)
        b_dp = tl.where(b_is, b_d_weight[:, None], b_dp)
        b_p = tl.where(b_is, tl.load(weight_ptr + o_k, m_token, 0.0)[:, None], b_p)
    if not NORMALISED:
        b_p = tl.load(probability_ptr + at, mask, 0.0)
    b_dlogits = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
    tl.store(out_ptr + at, b_dlogits.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def expert_gather_kernel(x_ptr, place_ptr, out_ptr, num_cols, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    i_token = tl.program_id(0).to(tl.int64)
    for start in range(0, num_cols, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m_col = o_col < num_cols
        b_x = tl.load(x_ptr + i_token * num_cols + o_col, m_col, 0.0)
        for k in tl.static_range(TOP_K):
            i_row = tl.load(place_ptr + i_token * TOP_K + k).to(tl.int64)
            tl.store(out_ptr + i_row * num_cols + o_col, b_x, o_col < tl.where(i_row >= 0, num_cols, 0))


@triton.jit
def expert_first_rows_kernel(
    counts_ptr, first_ptr, tiles_ptr, num_blocks, first_expert, num_experts, most,
    BLOCK: tl.constexpr, BB: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Write where each own expert's rows begin, where those of each block of tokens do (over its counts), and the table of tiles.

    A tile has an expert, its first row and its end; behind the last possible one stands how many there are. There is one program.
    """
    o_block, o_expert, o_own = tl.arange(0, BB), tl.arange(0, BE), tl.arange(0, BE) - first_expert
    m_own = (o_own >= 0) & (o_own < num_experts)
    b_total = tl.zeros([BE], tl.int32)
    for start in range(0, num_blocks, BB):
        at, mask = counts_ptr + (start + o_block)[:, None] * BE + o_expert[None, :], (start + o_block < num_blocks)[:, None]
        b_total += tl.sum(tl.load(at, mask, 0), 0)
    b_total = tl.where(m_own, b_total, 0)
    b_end = tl.cumsum(b_total, 0)
    b_first = b_end - b_total
    tl.store(first_ptr + o_own, b_first, m_own)
    tl.store(first_ptr + num_experts, tl.sum(b_total, 0))
    b_before = b_first
    for start in range(0, num_blocks, BB):
        at, mask = counts_ptr + (start + o_block)[:, None] * BE + o_expert[None, :], (start + o_block < num_blocks)[:, None]
        b_counts = tl.load(at, mask, 0)
        tl.store(at, b_before[None, :] + tl.cumsum(b_counts, 0) - b_counts, mask)
        b_before += tl.sum(b_counts, 0)
    b_num = (b_total + BLOCK - 1) // BLOCK
    b_after = tl.cumsum(b_num, 0)
    for start in range(0, most, BB):
        o_tile = start + o_block
        b_is = (o_tile[:, None] >= (b_after - b_num)[None, :]) & (o_tile[:, None] < b_after[None, :])
        b_row = tl.sum(tl.where(b_is, (b_first - (b_after - b_num) * BLOCK)[None, :] + o_tile[:, None] * BLOCK, 0), 1)
        b_last = tl.minimum(tl.sum(tl.where(b_is, b_end[None, :], 0), 1), b_row + BLOCK)
        m_tile = o_tile < most
        tl.store(tiles_ptr + 3 * o_tile, tl.sum(tl.where(b_is, o_own[None, :], 0), 1), m_tile)
        tl.store(tiles_ptr + 3 * o_tile + 1, b_row, m_tile)
        tl.store(tiles_ptr + 3 * o_tile + 2, b_last, m_tile)
    tl.store(tiles_ptr + 3 * most, tl.sum(b_num, 0))


@triton.jit
def expert_place_kernel(
    expert_ptr, weight_ptr, before_ptr, place_ptr, row_weight_ptr, num_tokens, first_expert, num_experts,
    TOP_K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Write the rows of a block of tokens: behind those of earlier blocks, in the order of tokens; -1 at an expert of another rank."""
    o_token, o_expert = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE)
    m_token = o_token < num_tokens
    b_all = tl.zeros([BT, BE], tl.int32)
    for k in tl.static_range(TOP_K):
        b_is = o_expert[None, :] == tl.load(expert_ptr + o_token * TOP_K + k, m_token, -1)[:, None]
        b_all += b_is.to(tl.int32)
    b_row = tl.load(before_ptr + tl.program_id(0) * BE + o_expert)[None, :] + tl.cumsum(b_all, 0) - b_all
    for k in tl.static_range(TOP_K):
        b_expert = tl.load(expert_ptr + o_token * TOP_K + k, m_token, -1)
        b_place = tl.sum(tl.where(o_expert[None, :] == b_expert[:, None], b_row, 0), 1)
        m_own = m_token & (b_expert >= first_expert) & (b_expert < first_expert + num_experts)
        tl.store(place_ptr + o_token * TOP_K + k, tl.where(m_own, b_place, -1), m_token)
        tl.store(row_weight_ptr + b_place, tl.load(weight_ptr + o_token * TOP_K + k, m_own, 0.0), m_own)


@triton.jit
def expert_swiglu_kernel(x_ptr, weight_ptr, y_ptr, end_ptr, num_cols, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    weight, stop = tl.load(weight_ptr + i_row), num_cols
    if end_ptr is not None:
        stop = tl.where(i_row < tl.load(end_ptr), num_cols, 0)
    for start in range(0, stop, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m_col = o_col < num_cols
        b_gate = tl.load(x_ptr + i_row * 2 * num_cols + o_col, m_col, 0.0).to(tl.float32)
        b_up = tl.load(x_ptr + (i_row * 2 + 1) * num_cols + o_col, m_col, 0.0).to(tl.float32)
        tl.store(y_ptr + i_row * num_cols + o_col, (b_gate * tl.sigmoid(b_gate) * b_up * weight).to(y_ptr.dtype.element_ty), m_col)


@triton.jit
def expert_swiglu_backward_kernel(dy_ptr, x_ptr, weight_ptr, d_weight_ptr, end_ptr, num_cols, BLOCK: tl.constexpr):
    """Write d[gate | up] over [gate | up]."""
    i_row = tl.program_id(0).to(tl.int64)
    weight, d_weight, stop = tl.load(weight_ptr + i_row), 0.0, num_cols
    if end_ptr is not None:
        stop = tl.where(i_row < tl.load(end_ptr), num_cols, 0)
    for start in range(0, stop, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m_col = o_col < num_cols
        gate_at, up_at = x_ptr + i_row * 2 * num_cols + o_col, x_ptr + (i_row * 2 + 1) * num_cols + o_col
        b_gate, b_up = tl.load(gate_at, m_col, 0.0).to(tl.float32), tl.load(up_at, m_col, 0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + i_row * num_cols + o_col, m_col, 0.0).to(tl.float32)
        b_sigmoid = tl.sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        d_weight += tl.sum(b_dy * b_silu * b_up, 0)
        b_dy *= weight
        tl.store(gate_at, (b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))).to(x_ptr.dtype.element_ty), m_col)
        tl.store(up_at, (b_dy * b_silu).to(x_ptr.dtype.element_ty), m_col)
    tl.store(d_weight_ptr + i_row, d_weight)


@triton.jit
def expert_combine_kernel(y_ptr, place_ptr, out_ptr, num_cols, num_blocks, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    i_token = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        i_row = tl.load(place_ptr + i_token * TOP_K + k).to(tl.int64)
        b_sum += tl.load(y_ptr + i_row * num_cols + o_col, o_col < tl.where(i_row >= 0, num_cols, 0), 0.0).to(tl.float32)
    tl.store(out_ptr + i_token * num_cols + o_col, b_sum.to(out_ptr.dtype.element_ty), o_col < num_cols)
