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

// Where a token's row of cells lies; -1: nowhere.
DEVICE i64 cell(const Rope& a, u32 token) {
    i64 id = load_id(a.id_bytes, (const char*)a.ids + token * a.ids_step);
    if (id >= 0 && id < a.n_all) return id;
    report(a.status, a.node);
    return -1;
}

// Blocks in x are tokens, in y the pairs and copied elements of their heads, then fours of their values.
KERNEL(256) rope(Rope a) {
    begin();
    u32 n_tokens = (u32)a.ne[2], token = blockIdx.x % n_tokens, seq = blockIdx.x / n_tokens;
    u32 width = (u32)(a.n_pairs + a.n_copied), n_head = (u32)a.ne[1];
    u32 at = blockIdx.y * blockDim.x + threadIdx.x, head = at / width, i = at % width;
    i64 row = a.cells && head >= (a.n_head_too ? n_head : 0) ? cell(a, token) : -1;
    bool too = head >= n_head;
    if (too) head -= n_head;
    if (too && head >= a.n_head_too) {
        i64 four = at - (n_head + a.n_head_too) * width;
        if (row < 0 || 4 * four >= a.n_values) return;
        float v[4];
        load_floats(F32, (const char*)(a.values + token * a.values_row + 16 * four), v);
        char* to = (char*)a.value_cells + row * a.value_cells_row;
        store_floats(a.cells_type, to + four * (a.cells_type == F32 ? 16 : 8), v);
        return;
    }
    const char* x = too ? (const char*)(a.x_too + seq * a.x_too_nb[3] + token * a.x_too_nb[2] + head * a.x_too_nb[1])
                        : (const char*)(a.x + seq * a.x_nb[3] + token * a.x_nb[2] + head * a.x_nb[1]);
    char* y = too ? (char*)(a.y_too + seq * a.y_too_nb[3] + token * a.y_too_nb[2] + head * a.y_too_nb[1])
                  : (char*)(a.y + seq * a.y_nb[3] + token * a.y_nb[2] + head * a.y_nb[1]);
    int size = a.cells_type == F32 ? 4 : 2;
    char* of_head = (char*)a.cells + row * a.cells_row + head * a.ne[0] * size;
    auto put = [&](i64 j, float v) {
        stored(y + j * (too ? a.y_too_nb[0] : a.y_nb[0]), a.halves, v);
        if (row >= 0) store_float(a.cells_type, of_head + j * size, v);
    };
    i64 step = too ? a.x_too_nb[0] : a.x_nb[0];
    if (i >= a.n_pairs) {
        i64 j = i - a.n_pairs;
        if (j >= a.first) j += 2 * a.n_pairs;
        return put(j, loaded(x + j * step, a.halves));
    }
    i64 low = a.first + (a.apart ? i : 2 * i), high = low + (a.apart ? a.n_pairs : 1);
    float2 turned = ((const float2*)a.turned)[token * a.n_pairs + i];
    float u = loaded(x + low * step, a.halves), v = loaded(x + high * step, a.halves);
    put(low, u * turned.x - v * turned.y);
    put(high, u * turned.y + v * turned.x);
}
