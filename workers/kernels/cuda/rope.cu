// Rotary positions: a table of cosines and sines for a batch, which layers share, and the rows that it turns.
// Angles are float64: positions are large, and float32 would not tell neighbours apart.

struct Turn {
    double angle;
    i64 kind;
};

DEVICE i32 position_at(const RopeTable& a, i64 i) {
    i32 position = *(const i32*)(a.positions + i * a.step);
    return position >= 0 && position < a.bound ? position : -1;
}

KERNEL(256) table(RopeTable a) {
    begin();
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, n_threads = (i64)gridDim.x * blockDim.x;
    for (i64 i = at; i < a.n_positions; i += n_threads) {
        if (position_at(a, i) < 0) report(a.status, a.node);
    }
    if (at >= a.n_tokens * a.n_pairs) return;
    i64 token = at / a.n_pairs, i = at % a.n_pairs;
    Turn turn = ((const Turn*)a.pairs)[i];
    i32 position = position_at(a, turn.kind * a.n_tokens + token);
    if (position < 0) return;
    double angle = position * turn.angle, sine, cosine;
    if (a.factors) angle /= ((const float*)a.factors)[i];
    sincos(angle, &sine, &cosine);
    ((float2*)a.turned)[at] = make_float2((float)cosine * a.magnitude, (float)sine * a.magnitude);
}

DEVICE float loaded(const char* at, i64 halves) { return halves ? float_of_half(*(const u16*)at) : *(const float*)at; }

DEVICE void stored(char* at, i64 halves, float x) {
    if (halves) *(u16*)at = half_of(x);
    else *(float*)at = x;
}

// A row that a thread turns a part of. `cell`: where its result also goes, or 0.
struct Head {
    const char* x;
    char *y, *cell;
    i64 x_step, y_step;
};

// The row of cells of a token; -1: none.
template <class A>
DEVICE i64 cell_of(const A& a, u32 token) {
    if (!a.cells) return -1;
    i64 id = load_id(a.id_bytes, (const char*)a.ids + token * a.ids_step);
    if (id >= 0 && id < a.n_all) return id;
    report(a.status, a.node);
    return -1;
}

template <class A>
DEVICE Head head_of(const A& a, u32 token, u32 seq, u32 head) {
    bool too = head >= a.ne[1];
    i64 row = too || !a.n_head_too ? cell_of(a, token) : -1;
    Head h;
    if (too) {
        head -= (u32)a.ne[1];
        h.x = (const char*)(a.x_too + seq * a.x_too_nb[3] + token * a.x_too_nb[2] + head * a.x_too_nb[1]);
        h.y = (char*)(a.y_too + seq * a.y_too_nb[3] + token * a.y_too_nb[2] + head * a.y_too_nb[1]);
        h.x_step = a.x_too_nb[0], h.y_step = a.y_too_nb[0];
    } else {
        h.x = (const char*)(a.x + seq * a.x_nb[3] + token * a.x_nb[2] + head * a.x_nb[1]);
        h.y = (char*)(a.y + seq * a.y_nb[3] + token * a.y_nb[2] + head * a.y_nb[1]);
        h.x_step = a.x_nb[0], h.y_step = a.y_nb[0];
    }
    h.cell = row < 0 ? 0 : (char*)a.cells + row * a.cells_row + head * a.ne[0] * (a.cells_type == F32 ? 4 : 2);
    return h;
}

// Four of a token's values go to their row of cells.
template <class A>
DEVICE void keep_values(const A& a, u32 token, i64 four) {
    i64 row = 4 * four < a.n_values ? cell_of(a, token) : -1;
    if (row < 0) return;
    float v[4];
    load_floats(F32, (const char*)(a.values + token * a.values_row + 16 * four), v);
    char* to = (char*)a.value_cells + row * a.value_cells_row;
    store_floats(a.cells_type, to + four * (a.cells_type == F32 ? 16 : 8), v);
}

// Pair i of a row, or behind these an element that is copied. `element` gives those of the row.
template <class A, class F>
DEVICE void turn(const A& a, const Head& h, u32 token, u32 i, F element) {
    auto put = [&](i64 j, float v) {
        stored(h.y + j * h.y_step, a.halves, v);
        if (h.cell) store_float(a.cells_type, h.cell + j * (a.cells_type == F32 ? 4 : 2), v);
    };
    if (i >= a.n_pairs) {
        i64 j = i - a.n_pairs;
        if (j >= a.first) j += 2 * a.n_pairs;
        return put(j, element(j));
    }
    i64 low = a.first + (a.apart ? i : 2 * i), high = low + (a.apart ? a.n_pairs : 1);
    float2 turned = ((const float2*)a.turned)[token * a.n_pairs + i];
    float u = element(low), v = element(high);
    put(low, u * turned.x - v * turned.y);
    put(high, u * turned.y + v * turned.x);
}

// Blocks in x are tokens, in y the pairs and copied elements of their heads, then fours of their values.
KERNEL(256) rope(Rope a) {
    begin();
    u32 n_tokens = (u32)a.ne[2], token = blockIdx.x % n_tokens, seq = blockIdx.x / n_tokens;
    u32 width = (u32)(a.n_pairs + a.n_copied), n_head = (u32)(a.ne[1] + a.n_head_too);
    u32 at = blockIdx.y * blockDim.x + threadIdx.x, head = at / width;
    if (head >= n_head) return keep_values(a, token, at - n_head * width);
    Head h = head_of(a, token, seq, head);
    turn(a, h, token, at % width, [&](i64 j) { return loaded(h.x + j * h.x_step, a.halves); });
}

// The same with a warp for a head, whose norm it turns: sums run as in a block of `norms` of 32 threads.
KERNEL(256) normed_rope(NormedRope a) {
    const int N = 2;
    __shared__ float rows[256 / WARP][4 * N * WARP];
    next_may_come();
    u32 n_tokens = (u32)a.ne[2], token = blockIdx.x % n_tokens, seq = blockIdx.x / n_tokens;
    u32 n_head = (u32)(a.ne[1] + a.n_head_too), at = blockIdx.y * blockDim.x + threadIdx.x, head = at / WARP;
    int lane = threadIdx.x % WARP, n = (int)a.ne[0];
    float* row = rows[threadIdx.x / WARP];
    float v[N][4] = {}, w[N][4] = {}, sum = 0.0f;
    for (int k = 0; k < N; k++) {
        int i = 4 * (lane + k * WARP);
        if (head < n_head && i < n) load_floats(F32, (const char*)(head < a.ne[1] ? a.w : a.w_too) + 4 * i, w[k]);
    }
    previous_done();
    if (head >= n_head) return keep_values(a, token, at - n_head * WARP);
    Head h = head_of(a, token, seq, head);
    for (int k = 0; k < N; k++) {
        int i = 4 * (lane + k * WARP);
        if (i < n) load_floats(F32, h.x + 4 * i, v[k]);
    }
    for (int k = 0; k < N; k++)
        for (int j = 0; j < 4; j++) sum += v[k][j] * v[k][j];
    float scale = 1.0f / sqrtf(warp_sum(sum) / (float)n + a.eps);
    for (int k = 0; k < N; k++)
        for (int j = 0; j < 4; j++) row[4 * (lane + k * WARP) + j] = v[k][j] * scale * w[k][j];
    __syncwarp();
    for (u32 i = lane; i < a.n_pairs + a.n_copied; i += WARP) turn(a, h, token, i, [&](i64 j) { return row[j]; });
}
