"""Triton kernels of the experts: the choice, the table of tiles, SwiGLU with weights, and the sum over a token's experts.

Each program has whole tokens or whole rows, so that a row's numbers depend on no other row.
"""

from fused_ops.launch.optional_triton import tl, triton


@triton.jit
def choose_kernel(
    logits_ptr, probability_ptr, expert_ptr, weight_ptr, near_ptr, num_tokens, num_experts, near,
    TOP_K: tl.constexpr, NORMALISED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
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
    b_weights, b_chosen = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.int32)
    for k in tl.static_range(TOP_K):
        b_best = tl.max(b_score, 1)
        b_first = tl.min(tl.where(b_score == b_best[:, None], o_expert[None, :], BE), 1)
        b_is = o_expert[None, :] == b_first[:, None]
        b_weight = tl.sum(tl.where(b_is, b_p, 0.0), 1)
        b_weights = tl.where(o_k[None, :] == k, b_weight[:, None], b_weights)
        b_chosen = tl.where(o_k[None, :] == k, b_first[:, None], b_chosen)
        b_score = tl.where(b_is, float("-inf"), b_score)
    if NORMALISED:
        b_weights = b_weights / tl.sum(b_weights, 1)[:, None]
    to = o_token.to(tl.int64)[:, None] * TOP_K + o_k[None, :]
    mask = m_token[:, None] & (o_k < TOP_K)[None, :]
    tl.store(expert_ptr + to, b_chosen, mask)
    tl.store(weight_ptr + to, b_weights, mask)
    tl.store(near_ptr + o_token, (b_best - tl.max(b_score, 1) < near).to(tl.int8), m_token)


@triton.jit
def place_kernel(order_ptr, weight_ptr, token_ptr, row_weight_ptr, place_ptr, num_rows, TOP_K: tl.constexpr, BR: tl.constexpr):
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    m_row = o_row < num_rows
    b_order = tl.load(order_ptr + o_row, m_row, 0)
    tl.store(token_ptr + o_row, (b_order // TOP_K).to(tl.int32), m_row)
    tl.store(row_weight_ptr + o_row, tl.load(weight_ptr + b_order, m_row, 0.0), m_row)
    tl.store(place_ptr + b_order, o_row, m_row)


@triton.jit
def tiles_kernel(first_ptr, tiles_ptr, num_experts, most, BLOCK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """Write expert, first row and end of each tile, and behind the last possible one how many there are."""
    o_tile, o_expert = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE)
    m_expert = o_expert < num_experts
    b_first, b_end = tl.load(first_ptr + o_expert, m_expert, 0), tl.load(first_ptr + 1 + o_expert, m_expert, 0)
    b_num = (b_end - b_first + BLOCK - 1) // BLOCK
    b_after = tl.cumsum(b_num, 0)
    b_before = b_after - b_num
    b_is = (o_tile[:, None] >= b_before[None, :]) & (o_tile[:, None] < b_after[None, :])
    b_row = tl.sum(tl.where(b_is, b_first[None, :] + (o_tile[:, None] - b_before[None, :]) * BLOCK, 0), 1)
    b_last = tl.minimum(tl.sum(tl.where(b_is, b_end[None, :], 0), 1), b_row + BLOCK)
    m_tile = o_tile < most
    tl.store(tiles_ptr + 3 * o_tile, tl.sum(tl.where(b_is, o_expert[None, :], 0), 1), m_tile)
    tl.store(tiles_ptr + 3 * o_tile + 1, b_row, m_tile)
    tl.store(tiles_ptr + 3 * o_tile + 2, b_last, m_tile)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr + 3 * most, tl.sum(b_num, 0))


@triton.jit
def swiglu_kernel(x_ptr, weight_ptr, y_ptr, num_cols, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + i_row)
    for start in range(0, num_cols, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        m_col = o_col < num_cols
        b_gate = tl.load(x_ptr + i_row * 2 * num_cols + o_col, m_col, 0.0).to(tl.float32)
        b_up = tl.load(x_ptr + (i_row * 2 + 1) * num_cols + o_col, m_col, 0.0).to(tl.float32)
        tl.store(y_ptr + i_row * num_cols + o_col, (b_gate * tl.sigmoid(b_gate) * b_up * weight).to(y_ptr.dtype.element_ty), m_col)


@triton.jit
def swiglu_backward_kernel(dy_ptr, x_ptr, weight_ptr, d_weight_ptr, num_cols, BLOCK: tl.constexpr):
    """Write d[gate | up] over [gate | up]."""
    i_row = tl.program_id(0).to(tl.int64)
    weight, d_weight = tl.load(weight_ptr + i_row), 0.0
    for start in range(0, num_cols, BLOCK):
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
def combine_kernel(y_ptr, place_ptr, out_ptr, num_cols, num_blocks, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    i_token = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_col = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < num_cols
    b_sum = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        i_row = tl.load(place_ptr + i_token * TOP_K + k).to(tl.int64)
        b_sum += tl.load(y_ptr + i_row * num_cols + o_col, m_col, 0.0).to(tl.float32)
    tl.store(out_ptr + i_token * num_cols + o_col, b_sum.to(out_ptr.dtype.element_ty), m_col)
