// Attention over pages of cells, with matrix instructions. D and DV: elements of a row of keys and of values; ROWS: queries of
// a tile, 16 or 64.
//
// A query's sums run over the cells of its sequence in one order, whatever stands beside it: a page of 64 cells after the
// other, eight pages a chunk whose softmax is one running sum, chunks one after the other. With 16 rows the warps of a block
// share a page's cells, and then its columns; with 64 each has 16 rows of its own. Both do the same to a row.
// Source: Dao et al., FlashAttention-2; Dao et al., Flash-Decoding for the chunks; Kwon et al. (PagedAttention).

#define WARPS 4
#define CHUNK_PAGES 8
#define CHUNK (CHUNK_PAGES * CELLS)
#define ONES 0x3c003c00u

constexpr bool WIDE = ROWS == 64;
// Rows of queries: 32 elements at once, and as many bytes more as keep neighbours in other banks.
constexpr int GROUPS = (D + 31) / 32, Q_ROW = 32 * (GROUPS | 1), P_ROW = CELLS + 8;
// What of a page's values is in shared memory at once, in octets of 16 bytes.
constexpr int V_CELLS = DV > 128 ? 32 : CELLS, V_WIDTH = DV > 256 ? 256 : DV, V_ROW = V_WIDTH + 8;
constexpr int OCTETS = V_WIDTH / 8, N_AHEAD = (V_CELLS * OCTETS + 127) / 128;
// Columns come in tiles of 8, of which a warp has each or each fourth.
constexpr int TILES = DV / 8, MINE = WIDE ? TILES : (TILES + WARPS - 1) / WARPS;
constexpr int PARTS = (DV + V_WIDTH - 1) / V_WIDTH, PER_PART = WIDE ? TILES : (OCTETS + WARPS - 1) / WARPS;
// Tiles of 8 cells whose scores a warp makes.
constexpr int SCORED = WIDE ? 8 : 2;

DEVICE u32 widened(u32 bytes, u32 which, u32 scale) {
    u32 offset = choose_bytes(bytes ^ 0x80808080u, 0x64646464u, which);  // 1024 + 128 + each
    return mul_halves(sub_halves(offset, 0x64806480u), scale);
}

// Eight elements of a cell's row, from 8 i on, as float16.
DEVICE uint4 octet(const char* row, int i, i64 q8) {
    if (!q8) return *(const uint4*)(row + 16 * i);
    const u16* block = (const u16*)(row + 34 * (i / 4));
    const u16* at = block + 1 + 4 * (i % 4);
    u32 scale = pair(block[0], block[0]), low = pair(at[0], at[1]), high = pair(at[2], at[3]);
    return make_uint4(widened(low, 0x4140, scale), widened(low, 0x4342, scale), widened(high, 0x4140, scale),
                      widened(high, 0x4342, scale));
}

// A row of queries as float16 times a power of two, so that its largest lies between 2^10 and 2^11. Returns what undoes it.
DEVICE float halve(const float* q, u16* row, int lane) {
    float top = 0.0f;
    for (int i = lane; i < D; i += WARP) top = fmaxf(top, fabsf(q[i]));
    u32 exponent = max(__float_as_uint(warp_max(top)) >> 23, 11u);
    float up = __uint_as_float((264 - exponent) << 23);
    for (int i = lane; i < 32 * GROUPS; i += WARP) row[i] = i < D ? half_of(q[i] * up) : 0;
    return __uint_as_float((exponent - 10) << 23);
}

// Queries of a tile: `base` is the first of its unit, whose first token is `token`.
struct Tile {
    int base, group, head;
    i64 token;
};

DEVICE i64 token_of(const Tile& tile, int row) { return tile.token + (tile.base + row) / tile.group; }
DEVICE i64 head_of(const Tile& tile, int row) { return tile.head + (tile.base + row) % tile.group; }

// A page of one head's rows, `n_bytes` each, will be read soon.
DEVICE void expect(i64 page, i64 row_bytes, int n_bytes) {
    int lines = (n_bytes + 127) / 128;
    for (int i = threadIdx.x; i < CELLS * lines; i += 128)
        prefetch((const char*)(page + i / lines * row_bytes + i % lines * 128));
}

DEVICE void expect_page(const PagedAttend& a, i64 head_kv, i64 sequence, int page) {
    i64 number = ((const i32*)a.pages)[sequence * a.n_pages + page];
    if (number < 0 || number >= a.n_pool) return;
    expect(a.k + head_kv * a.k_head + number * CELLS * a.k_row, a.k_row, a.k_q8 ? D / 32 * 34 : 2 * D);
    expect(a.v + head_kv * a.v_head + number * CELLS * a.v_row, a.v_row, a.v_q8 ? DV / 32 * 34 : 2 * DV);
}

KERNEL(128) attend(PagedAttend a) {
    begin();
    __shared__ __align__(16) u16 queries[ROWS * Q_ROW];
    __shared__ __align__(16) u16 values[V_CELLS * V_ROW];
    __shared__ __align__(16) u16 weights[WIDE ? 8 : ROWS * P_ROW];
    __shared__ float peaks[WARPS][16], factors[ROWS];
    __shared__ int begins[ROWS], ends[ROWS], sequences[ROWS], fresh[ROWS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    i64 split = blockIdx.x % a.n_splits, which = blockIdx.x / a.n_splits, head_kv = blockIdx.y / a.n_slots;
    int group = (int)(a.n_head / a.n_head_kv);
    Tile tile = {(int)(which % a.n_tiles) * ROWS, group, (int)head_kv * group, which / a.n_tiles * a.unit};
    int n = (int)min((i64)ROWS, min(a.unit, a.n_tokens - tile.token) * group - tile.base);

    // The sequence of this block is one of those whose tokens are in the tile.
    i64 first = token_of(tile, 0);
    int n_tokens = (int)(token_of(tile, n - 1) - first) + 1;
    if (threadIdx.x < n_tokens) {
        i64 token = first + threadIdx.x, n_seen = ((const i32*)a.n_seen)[token];
        i64 sequence = a.rows ? ((const i32*)a.rows)[token] : 0;
        if (n_seen < 0 || n_seen > CELLS * a.n_pages || sequence < 0 || sequence >= a.n_sequences) {
            report(a.status, a.node);
            sequence = -1;
        }
        sequences[threadIdx.x] = (int)sequence;
    }
    __syncthreads();
    if (threadIdx.x < n_tokens) {
        bool is = sequences[threadIdx.x] >= 0;
        for (int i = 0; i < threadIdx.x && is; i++) is = sequences[i] != sequences[threadIdx.x];
        fresh[threadIdx.x] = is;
    }
    __syncthreads();
    int sequence = -1, left = (int)(blockIdx.y % a.n_slots);
    for (int i = 0; i < n_tokens && sequence < 0; i++) {
        if (fresh[i] && left-- == 0) sequence = sequences[i];
    }
    if (sequence < 0) return;

    // What rows see; those of other sequences end before they begin.
    if (threadIdx.x < ROWS) {
        int row = threadIdx.x;
        Seen seen = {0, -1};
        if (row < n && sequences[token_of(tile, row) - first] == sequence)
            seen = seen_of(((const i32*)a.n_seen)[token_of(tile, row)], a.n_pages, a.window);
        begins[row] = (int)seen.begin, ends[row] = (int)seen.end;
    }
    __syncthreads();
    u32 some = ~0u, most = 0;
    for (int row = lane; row < ROWS; row += WARP) {
        if (begins[row] < ends[row]) some = min(some, (u32)begins[row]), most = max(most, (u32)ends[row]);
    }
    int end = (int)__reduce_max_sync(ALL_LANES, most), begin = end ? (int)__reduce_min_sync(ALL_LANES, some) : 0;
    int chunk = begin / CHUNK, last_chunk = (end + CHUNK - 1) / CHUNK;
    if (a.parts) {
        if (split < chunk || split >= last_chunk) return;
        chunk = (int)split, last_chunk = chunk + 1;
    }
    last_chunk = max(last_chunk, 1);  // who sees nothing gives zeros
    int last_page = min(CHUNK_PAGES * last_chunk, (end + CELLS - 1) / CELLS);
    if (end) expect_page(a, head_kv, sequence, max(CHUNK_PAGES * chunk, begin / CELLS));

    for (int row = warp; row < ROWS; row += WARPS) {
        u16* to = queries + row * Q_ROW;
        if (ends[row] < 0) {
            for (int i = lane; i < 32 * GROUPS; i += WARP) to[i] = 0;
            if (lane == 0) factors[row] = 0.0f;
            continue;
        }
        float undo = halve((const float*)(a.q + token_of(tile, row) * a.q_row + head_of(tile, row) * a.q_head), to, lane);
        if (lane == 0) factors[row] = undo * a.scale * (a.softcap != 0.0f ? 1.0f : LOG2E);
    }
    __syncthreads();

    // This thread's rows: these and those 8 behind them.
    int row = g + (WIDE ? 16 * warp : 0), first_cell = WIDE ? 0 : 16 * warp;
    int row_begin[2] = {begins[row], begins[row + 8]}, row_end[2] = {ends[row], ends[row + 8]};
    float factor[2] = {factors[row], factors[row + 8]};
    float total_peak[2] = {-INFINITE, -INFINITE}, total_sum[2] = {0.0f, 0.0f};
    bool begun[2] = {false, false};

    for (; chunk < last_chunk; chunk++) {
        float o[MINE][4], sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, peak[2] = {-INFINITE, -INFINITE};
#pragma unroll
        for (int i = 0; i < MINE; i++)
            for (int e = 0; e < 4; e++) o[i][e] = 0.0f;
        for (int page = max(CHUNK_PAGES * chunk, begin / CELLS); page < min(CHUNK_PAGES * (chunk + 1), last_page); page++) {
            i64 number = ((const i32*)a.pages)[sequence * a.n_pages + page];
            if (number < 0 || number >= a.n_pool) {
                report(a.status, a.node);
                continue;
            }
            if (page + 1 < last_page) expect_page(a, head_kv, sequence, page + 1);
            const char* k = (const char*)(a.k + head_kv * a.k_head + number * CELLS * a.k_row);
            const char* v = (const char*)(a.v + head_kv * a.v_head + number * CELLS * a.v_row);
            uint4 ahead[N_AHEAD];
            // Values that nobody sees may be anything: they are zeros, since they are multiplied by weights of 0.
            auto fetch = [&](int part, int at) {
#pragma unroll
                for (int i = 0; i < N_AHEAD; i++) {
                    u32 j = threadIdx.x + 128 * i;
                    int cell = at + j / OCTETS, column = OCTETS * part + j % OCTETS, seen = page * CELLS + cell;
                    bool is = cell < at + V_CELLS && column < TILES && seen >= begin && seen < end;
                    ahead[i] = is ? octet(v + cell * a.v_row, column, a.v_q8) : make_uint4(0, 0, 0, 0);
                }
            };
            if (!WIDE) fetch(0, 0);

            float score[SCORED][4];
#pragma unroll
            for (int j = 0; j < SCORED; j++)
                for (int e = 0; e < 4; e++) score[j][e] = 0.0f;
#pragma unroll(WIDE ? 2 : GROUPS <= 8 ? GROUPS : 6)
            for (int i = 0; i < GROUPS; i++) {
                // Of 32 elements each lane takes eight that lie together, of queries and of keys alike.
                const u16* from = queries + row * Q_ROW + 32 * i + 8 * t;
                uint4 q = *(const uint4*)from, q8 = *(const uint4*)(from + 8 * Q_ROW);
#pragma unroll
                for (int j = 0; j < SCORED; j++) {
                    uint4 x = make_uint4(0, 0, 0, 0);
                    if (D % 32 == 0 || 4 * i + t < D / 8)
                        x = octet(k + (first_cell + 8 * j + g) * a.k_row, 4 * i + t, a.k_q8);
                    mma_halves(score[j], q.x, q8.x, q.y, q8.y, x.x, x.y);
                    mma_halves(score[j], q.z, q8.z, q.w, q8.w, x.z, x.w);
                }
            }
            float top[2] = {-INFINITE, -INFINITE};
#pragma unroll
            for (int j = 0; j < SCORED; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int cell = page * CELLS + first_cell + 8 * j + 2 * t + e % 2;
                    float x = score[j][e] * factor[e / 2];
                    if (a.softcap != 0.0f) x = capped(x, a.softcap) * LOG2E;
                    score[j][e] = cell >= row_begin[e / 2] && cell < row_end[e / 2] ? x : -INFINITE;
                    top[e / 2] = fmaxf(top[e / 2], score[j][e]);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                top[h] = fmaxf(top[h], __shfl_xor_sync(ALL_LANES, top[h], 1));
                top[h] = fmaxf(top[h], __shfl_xor_sync(ALL_LANES, top[h], 2));
                if (!WIDE && t == 0) peaks[warp][g + 8 * h] = top[h];
            }
            if (WIDE) fetch(0, 0);
            __syncthreads();
            u32 p[4][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                for (int w = 0; !WIDE && w < WARPS; w++) top[h] = fmaxf(top[h], peaks[w][g + 8 * h]);
                top[h] = fmaxf(top[h], peak[h]);
                float keep = rescaled(peak[h], top[h]);
                peak[h] = top[h];
                sum[2 * h] *= keep, sum[2 * h + 1] *= keep;
#pragma unroll
                for (int i = 0; i < MINE; i++) o[i][2 * h] *= keep, o[i][2 * h + 1] *= keep;
#pragma unroll
                for (int j = 0; j < SCORED; j++) {
                    u32 two = halves_of(weight(score[j][2 * h], top[h]), weight(score[j][2 * h + 1], top[h]));
                    if (WIDE) p[j / 2 % 4][j % 2 * 2 + h] = two;
                    else *(u32*)(weights + (g + 8 * h) * P_ROW + first_cell + 8 * j + 2 * t) = two;
                }
            }
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int at = 0; at < CELLS; at += V_CELLS) {
                    if (part || at) {
                        __syncthreads();
                        fetch(part, at);
                    }
#pragma unroll
                    for (int i = 0; i < N_AHEAD; i++) {
                        u32 j = threadIdx.x + 128 * i;
                        if (j < V_CELLS * OCTETS) *(uint4*)(values + j / OCTETS * V_ROW + j % OCTETS * 8) = ahead[i];
                    }
                    __syncthreads();
                    if (!WIDE && part == 0 && at == 0) {
#pragma unroll
                        for (int i = 0; i < 16; i++) {
                            const u16* from = weights + (g + i % 2 * 8) * P_ROW + i / 4 * 16 + i % 4 / 2 * 8 + 2 * t;
                            p[i / 4][i % 4] = *(const u32*)from;
                        }
                    }
#pragma unroll
                    for (int j = 0; j < V_CELLS / 16; j++) {
                        const u32* x = p[at / 16 + j];
                        if (part == 0) mma_halves(sum, x[0], x[1], x[2], x[3], ONES, ONES);
                    }
#pragma unroll
                    for (int i = 0; i < PER_PART; i++) {
                        int at_tile = WIDE ? i : WARPS * i + warp;
                        if (OCTETS * part + at_tile >= TILES || PER_PART * part + i >= MINE) continue;
#pragma unroll
                        for (int j = 0; j < V_CELLS; j += 32) {
                            u32 x[4];
                            load_transposed(x, values + (j + lane) * V_ROW + 8 * at_tile);
                            const u32 *one = p[(at + j) / 16], *two = p[(at + j) / 16 + 1];
                            float(&to)[4] = o[(PER_PART * part + i) % MINE];
                            mma_halves(to, one[0], one[1], one[2], one[3], x[0], x[1]);
                            mma_halves(to, two[0], two[1], two[2], two[3], x[2], x[3]);
                        }
                    }
                }
            }
        }

        // Between chunks totals lie where the result will be; each element is one thread's.
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (row_end[h] < 0) continue;
            i64 head = head_of(tile, row + 8 * h), query = token_of(tile, row + 8 * h) * a.n_head + head;
            i64 part = query * a.n_splits + split;
            float* to = a.parts ? (float*)a.parts + part * DV : (float*)a.y + query * DV;
            float keep = 0.0f, by = 1.0f, final = 1.0f;
            if (a.parts) {
                if (t == 0 && (WIDE || warp == 0)) ((float2*)a.sums)[part] = make_float2(peak[h], sum[2 * h]);
            } else {
                merge_sums(total_peak[h], total_sum[h], peak[h], sum[2 * h], keep, by);
                if (chunk + 1 == last_chunk)
                    final = finishing(total_peak[h], total_sum[h], a.sinks ? (const float*)a.sinks + head : nullptr);
            }
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                int at_tile = WIDE ? i : WARPS * i + warp;
                if (at_tile >= TILES) continue;
                float2* place = (float2*)(to + 8 * at_tile + 2 * t);
                float2 x = begun[h] ? *place : make_float2(0.0f, 0.0f);
                x.x = merged(x.x, keep, o[i][2 * h], by), x.y = merged(x.y, keep, o[i][2 * h + 1], by);
                *place = a.parts ? make_float2(o[i][2 * h], o[i][2 * h + 1]) : make_float2(x.x * final, x.y * final);
            }
            begun[h] = true;
        }
    }
}

// A block for each query.
KERNEL(128) merge(Merge a) {
    begin();
    constexpr int N = (DV + 127) / 128;
    i64 query = blockIdx.x, token = query / a.n_head;
    Seen seen = seen_of(((const i32*)a.n_seen)[token], CHUNK_PAGES * a.n_splits, a.window);
    float total[N], total_peak = -INFINITE, total_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) total[i] = 0.0f;
#pragma unroll 4
    for (i64 chunk = seen.begin / CHUNK; chunk < (seen.end + CHUNK - 1) / CHUNK; chunk++) {
        i64 at = query * a.n_splits + chunk;
        float2 part = ((const float2*)a.sums)[at];
        float x[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            int column = threadIdx.x + 128 * i;
            x[i] = column < DV ? ((const float*)a.parts)[at * DV + column] : 0.0f;
        }
        float keep, by;
        merge_sums(total_peak, total_sum, part.x, part.y, keep, by);
#pragma unroll
        for (int i = 0; i < N; i++) total[i] = merged(total[i], keep, x[i], by);
    }
    float by = finishing(total_peak, total_sum, a.sinks ? (const float*)a.sinks + query % a.n_head : nullptr);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (threadIdx.x + 128 * i < DV) ((float*)a.y)[query * DV + threadIdx.x + 128 * i] = total[i] * by;
    }
}
