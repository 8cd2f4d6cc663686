// Attention over pages of cells, with matrix instructions. D and DV: elements of a row of keys and of values; ROWS: queries
// of a tile, 16 or 64; CAPPED, where it is defined: scores are capped, which takes registers that others use better.
//
// A query's sums run over the cells of its sequence in one order, whatever stands beside it: the softmax of a page of 64
// cells by itself, four pages one after the other a chunk, chunks one after the other. A block takes all of them, or a
// chunk, or a page; then `merge` goes on in the same order. With 16 rows the warps of a block share a page's cells, and then
// its columns; with 64 each has 16 rows of its own. Both do the same to a row.
// Source: Dao et al., FlashAttention-2; Dao et al., Flash-Decoding for the chunks; Kwon et al. (PagedAttention).

#define WARPS 4
#define CHUNK_PAGES 4
#define ONES 0x3c003c00u

constexpr bool WIDE = ROWS == 64;
// Rows of queries: 32 elements at once, and as many bytes more as keep neighbours in other banks.
constexpr int GROUPS = (D + 31) / 32, Q_ROW = 32 * (GROUPS | 1), P_ROW = CELLS + 8;
// A page comes to shared memory in pieces of up to 128 columns, keys first. Two are on their way while one is read.
constexpr int K_GROUPS = GROUPS < 4 ? GROUPS : 4, K_PIECES = (GROUPS + 3) / 4, K_ROW = 32 * (K_GROUPS | 1);
constexpr int TILES = DV / 8, V_OCTETS = TILES < 16 ? TILES : 16, V_PIECES = (TILES + 15) / 16, V_ROW = 8 * (V_OCTETS | 1);
constexpr int PIECES = K_PIECES + V_PIECES, SLOTS = 3, SLOT = CELLS * (K_ROW > V_ROW ? K_ROW : V_ROW);
constexpr int ROOM_BYTES = 2 * (SLOTS * SLOT + ROWS * Q_ROW + (WIDE ? 0 : ROWS * P_ROW));
// Columns come in tiles of 8, of which a warp has each or each fourth.
constexpr int PER_PIECE = WIDE ? V_OCTETS : (V_OCTETS + WARPS - 1) / WARPS, MINE = PER_PIECE * V_PIECES;
// Tiles of 8 cells whose scores a warp makes.
constexpr int SCORED = WIDE ? 8 : 2;
// Rows of queries that a warp reads at once.
constexpr int AT_ONCE = 4;

DEVICE u32 widened(u32 bytes, u32 which, u32 scale) {
    u32 offset = choose_bytes(bytes ^ 0x80808080u, 0x64646464u, which);  // 1024 + 128 + each
    return mul_halves(sub_halves(offset, 0x64806480u), scale);
}

// Eight elements of a cell's row of Q8_0, from 8 i on, as float16.
DEVICE uint4 octet(const char* row, int i) {
    const u16* block = (const u16*)(row + 34 * (i / 4));
    const u16* at = block + 1 + 4 * (i % 4);
    u32 scale = pair(block[0], block[0]), low = pair(at[0], at[1]), high = pair(at[2], at[3]);
    return make_uint4(widened(low, 0x4140, scale), widened(low, 0x4342, scale), widened(high, 0x4140, scale),
                      widened(high, 0x4342, scale));
}

// A piece of a page: octets from `first` on of its cells from `from` to `until`. The others are zeros: nobody sees these
// cells, and what they hold may be no number, which a weight of 0 would not hide.
template <int ROW, int OCTETS>
DEVICE void bring(u16* to, i64 rows, i64 row_bytes, i64 q8, int first, int n_octets, int from, int until) {
    constexpr int N = (CELLS * OCTETS + 127) / 128;
    // Where the threads are a number of whole rows, each stays in its column.
    constexpr bool STAYS = 128 % OCTETS == 0;
    if (!q8) {
        i64 place = rows + threadIdx.x / OCTETS * row_bytes + 16 * (first + threadIdx.x % OCTETS);
#pragma unroll
        for (int i = 0; i < N; i++) {
            int j = threadIdx.x + 128 * i, cell = j / OCTETS, column = j % OCTETS;
            if (!STAYS && cell >= CELLS) break;
            if (!STAYS) place = rows + cell * row_bytes + 16 * (first + column);
            bool is = cell >= from && cell < until && first + column < n_octets;
            fetch16_or_zeros(to + cell * ROW + 8 * column, (const char*)place, is);
            place += 128 / OCTETS * row_bytes;
        }
        return;
    }
    // Some are read before the first is used; a page has its cells, seen or not.
    constexpr int SOME = N < 4 ? N : 4;
#pragma unroll 1
    for (int begin = 0; begin < N; begin += SOME) {
        uint4 x[SOME];
#pragma unroll
        for (int i = 0; i < SOME; i++) {
            int j = threadIdx.x + 128 * (begin + i), cell = min(j / OCTETS, CELLS - 1);
            x[i] = make_uint4(0, 0, 0, 0);
            if (until > 0) x[i] = octet((const char*)(rows + cell * row_bytes), min(first + j % OCTETS, n_octets - 1));
        }
#pragma unroll
        for (int i = 0; i < SOME; i++) {
            int j = threadIdx.x + 128 * (begin + i), cell = j / OCTETS, column = j % OCTETS;
            bool is = cell >= from && cell < until && first + column < n_octets;
            if (cell < CELLS) *(uint4*)(to + cell * ROW + 8 * column) = is ? x[i] : make_uint4(0, 0, 0, 0);
        }
    }
}

// A row of queries, of which lane l has elements l, l + 32 and so on, as float16 times a power of two, so that its largest
// lies between 2^10 and 2^11. Returns what undoes it.
DEVICE float halve(const float (&q)[GROUPS], u16* row, int lane) {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) top = fmaxf(top, fabsf(q[i]));
    u32 exponent = max(__float_as_uint(warp_max(top)) >> 23, 11u);
    float up = __uint_as_float((264 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) row[WARP * i + lane] = half_of(q[i] * up);
    return __uint_as_float((exponent - 10) << 23);
}

// Queries of a tile: `base` is the first of its unit, whose first token is `token`.
struct Tile {
    int base, group, head;
    i64 token;
};

DEVICE i64 token_of(const Tile& tile, int row) { return tile.token + (tile.base + row) / tile.group; }
DEVICE i64 head_of(const Tile& tile, int row) { return tile.head + (tile.base + row) % tile.group; }

// Rows of a page, `n_bytes` each, will be read soon.
DEVICE void expect(i64 rows, i64 row_bytes, int n_bytes) {
    int n_lines = (n_bytes + 127) / 128;
    for (int i = threadIdx.x; i < CELLS * n_lines; i += 128)
        prefetch((const char*)(rows + i / n_lines * row_bytes + i % n_lines * 128));
}

KERNEL(128) attend(PagedAttend a) {
    next_may_come();
    if (!a.given) previous_done();
    ROOM(room, ROOM_BYTES);
    u16 *slots = (u16*)room, *queries = slots + SLOTS * SLOT, *weights = queries + ROWS * Q_ROW;
    __shared__ float peaks[WARPS][16], factors[ROWS];
    __shared__ int begins[ROWS], ends[ROWS], sequences[ROWS], counts[ROWS], fresh[ROWS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    u32 n_splits = (u32)a.n_splits, n_tiles = (u32)a.n_tiles, n_slots = (u32)a.n_slots;
    u32 split = blockIdx.x % n_splits, head_kv = blockIdx.y / n_slots, group = (u32)a.n_head / (u32)a.n_head_kv;
    // The last tiles of a prompt see most, and come first.
    u32 which = gridDim.x / n_splits - 1 - blockIdx.x / n_splits;
    Tile tile = {(int)(which % n_tiles * ROWS), (int)group, (int)(head_kv * group), which / n_tiles * a.unit};
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
        sequences[threadIdx.x] = (int)sequence, counts[threadIdx.x] = (int)n_seen;
    }
    __syncthreads();
    if (threadIdx.x < n_tokens) {
        bool is = sequences[threadIdx.x] >= 0;
        for (int i = 0; i < threadIdx.x && is; i++) is = sequences[i] != sequences[threadIdx.x];
        fresh[threadIdx.x] = is;
    }
    __syncthreads();
    int sequence = -1, left = (int)(blockIdx.y % n_slots);
    for (int i = 0; i < n_tokens && sequence < 0; i++) {
        if (fresh[i] && left-- == 0) sequence = sequences[i];
    }

    // What rows see; those of other sequences end before they begin.
    if (threadIdx.x < ROWS) {
        int row = threadIdx.x, token = (int)(token_of(tile, row) - first);
        Seen seen = {0, -1};
        if (row < n && sequence >= 0 && sequences[token] == sequence) seen = seen_of(counts[token], a.n_pages, a.window);
        begins[row] = (int)seen.begin, ends[row] = (int)seen.end;
    }
    __syncthreads();
    u32 some = ~0u, most = 0;
    for (int row = lane; row < ROWS; row += WARP) {
        if (begins[row] < ends[row]) some = min(some, (u32)begins[row]), most = max(most, (u32)ends[row]);
    }
    int end = (int)__reduce_max_sync(ALL_LANES, most), begin = end ? (int)__reduce_min_sync(ALL_LANES, some) : 0;
    int page = begin / CELLS, last_page = (end + CELLS - 1) / CELLS;
    int first_page = (int)(split * a.split_pages);
    if (a.parts) page = max(page, first_page), last_page = min(last_page, first_page + (int)a.split_pages);
    const i32* pages = (const i32*)a.pages + sequence * a.n_pages;
    i64 number = -1, next_number = page < last_page ? pages[page] : -1;
    if (a.given) {
        if (next_number >= 0 && next_number < a.n_pool) {
            expect(a.k + head_kv * a.k_head + next_number * CELLS * a.k_row, a.k_row, a.k_q8 ? D / 32 * 34 : 2 * D);
            expect(a.v + head_kv * a.v_head + next_number * CELLS * a.v_row, a.v_row, a.v_q8 ? DV / 32 * 34 : 2 * DV);
        }
        previous_done();
    }
    if (sequence < 0 || (a.parts && page >= last_page)) return;

    // Pieces are brought in the order in which they are read.
    int to = 0, at = 0;
    auto bring_piece = [&](int page, int piece) {
        if (page < last_page) {
            if (piece == 0) {
                number = next_number;
                if (number < 0 || number >= a.n_pool) {
                    report(a.status, a.node);
                    number = -1;
                }
                if (page + 1 < last_page) next_number = pages[page + 1];
            }
            int from = begin - page * CELLS, until = number < 0 ? 0 : end - page * CELLS;
            i64 cell = number * CELLS, k = a.k + head_kv * a.k_head + cell * a.k_row;
            i64 v = a.v + head_kv * a.v_head + cell * a.v_row;
            u16* slot = slots + to * SLOT;
            if (piece < K_PIECES) bring<K_ROW, 4 * K_GROUPS>(slot, k, a.k_row, a.k_q8, 16 * piece, D / 8, from, until);
            else bring<V_ROW, V_OCTETS>(slot, v, a.v_row, a.v_q8, 16 * (piece - K_PIECES), TILES, from, until);
        }
        end_of_lot();
        to = to + 1 < SLOTS ? to + 1 : 0;
    };
    // Waits for a piece. All are done with the one before, whose place the next but one takes.
    auto piece_of = [&](int page, int piece) {
        fetched<1>();
        __syncthreads();
        bring_piece(page + (piece + 2) / PIECES, (piece + 2) % PIECES);
        const u16* slot = slots + at * SLOT;
        at = at + 1 < SLOTS ? at + 1 : 0;
        return slot;
    };
    bring_piece(page, 0);
    bring_piece(page, 1);

    for (int first_row = warp; first_row < ROWS; first_row += WARPS * AT_ONCE) {
        float q[AT_ONCE][GROUPS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int row = first_row + WARPS * i;
            bool is = ends[row] >= 0;
            i64 place = is ? token_of(tile, row) * a.q_row + head_of(tile, row) * a.q_head : 0;
            const float* from = (const float*)(a.q + place);
#pragma unroll
            for (int j = 0; j < GROUPS; j++) q[i][j] = is && WARP * j + lane < D ? from[WARP * j + lane] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int row = first_row + WARPS * i;
            float undo = halve(q[i], queries + row * Q_ROW, lane);
#ifndef CAPPED
            undo *= LOG2E;
#endif
            if (lane == 0) factors[row] = undo * a.scale;
        }
    }
    __syncthreads();

    // This thread's rows: these and those 8 behind them.
    int row = g + (WIDE ? 16 * warp : 0), first_cell = WIDE ? 0 : 16 * warp;
    int row_begin[2] = {begins[row], begins[row + 8]}, row_end[2] = {ends[row], ends[row + 8]};
    float factor[2] = {factors[row], factors[row + 8]};
    float total_peak[2] = {-INFINITE, -INFINITE}, total_sum[2] = {0.0f, 0.0f};
    bool begun[2] = {false, false};
    float o[MINE][4], sum[2] = {0.0f, 0.0f}, peak[2] = {-INFINITE, -INFINITE};
#pragma unroll
    for (int i = 0; i < MINE; i++)
        for (int e = 0; e < 4; e++) o[i][e] = 0.0f;

    for (bool last = false; !last; page++) {
        last = page + 1 >= last_page;
        if (page < last_page) {
            float score[SCORED][4];
#pragma unroll
            for (int j = 0; j < SCORED; j++)
                for (int e = 0; e < 4; e++) score[j][e] = 0.0f;
#pragma unroll
            for (int piece = 0; piece < K_PIECES; piece++) {
                const u16* keys = piece_of(page, piece);
#pragma unroll
                for (int i = 0; i < K_GROUPS; i++) {
                    if (K_GROUPS * piece + i >= GROUPS) break;
                    // Of 32 elements each lane takes eight that lie together, of queries and of keys alike.
                    const u16* from = queries + row * Q_ROW + 32 * (K_GROUPS * piece + i) + 8 * t;
                    uint4 q = *(const uint4*)from, q8 = *(const uint4*)(from + 8 * Q_ROW);
#pragma unroll
                    for (int j = 0; j < SCORED; j++) {
                        uint4 x = *(const uint4*)(keys + (first_cell + 8 * j + g) * K_ROW + 32 * i + 8 * t);
                        mma_halves(score[j], q.x, q8.x, q.y, q8.y, x.x, x.y);
                        mma_halves(score[j], q.z, q8.z, q.w, q8.w, x.z, x.w);
                    }
                }
            }
            float top[2] = {-INFINITE, -INFINITE};
#pragma unroll
            for (int j = 0; j < SCORED; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int cell = page * CELLS + first_cell + 8 * j + 2 * t + e % 2;
                    float x = score[j][e] * factor[e / 2];
#ifdef CAPPED
                    x = capped(x, a.softcap) * LOG2E;
#endif
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
            if (!WIDE) __syncthreads();
            u32 p[4][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                for (int w = 0; !WIDE && w < WARPS; w++) top[h] = fmaxf(top[h], peaks[w][g + 8 * h]);
#pragma unroll
                for (int j = 0; j < SCORED; j++) {
                    u32 two = halves_of(weight(score[j][2 * h], top[h]), weight(score[j][2 * h + 1], top[h]));
                    if (WIDE) p[j / 2 % 4][j % 2 * 2 + h] = two;
                    else *(u32*)(weights + (g + 8 * h) * P_ROW + first_cell + 8 * j + 2 * t) = two;
                }
            }
            float keep[2], by[2];
#pragma unroll
            for (int piece = 0; piece < V_PIECES; piece++) {
                const u16* values = piece_of(page, K_PIECES + piece);
                if (piece == 0) {
                    float here[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                    for (int i = 0; i < 16; i++) {
                        const u16* from = weights + (g + i % 2 * 8) * P_ROW + i / 4 * 16 + i % 4 / 2 * 8 + 2 * t;
                        if (!WIDE) p[i / 4][i % 4] = *(const u32*)from;
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++) mma_halves(here, p[j][0], p[j][1], p[j][2], p[j][3], ONES, ONES);
#pragma unroll
                    for (int h = 0; h < 2; h++) merge_sums(peak[h], sum[h], top[h], here[2 * h], keep[h], by[h]);
                }
#pragma unroll
                for (int i = 0; i < PER_PIECE; i++) {
                    int at_tile = WIDE ? i : WARPS * i + warp;
                    if (at_tile >= V_OCTETS || V_OCTETS * piece + at_tile >= TILES) continue;
                    float here[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        u32 x[4];
                        load_transposed(x, values + (32 * j + lane) * V_ROW + 8 * at_tile);
                        const u32 *one = p[2 * j], *two = p[2 * j + 1];
                        mma_halves(here, one[0], one[1], one[2], one[3], x[0], x[1]);
                        mma_halves(here, two[0], two[1], two[2], two[3], x[2], x[3]);
                    }
                    float(&all)[4] = o[PER_PIECE * piece + i];
#pragma unroll
                    for (int e = 0; e < 4; e++) all[e] = merged(all[e], keep[e / 2], here[e], by[e / 2]);
                }
            }
        }
        if (!last && (page + 1) % CHUNK_PAGES) continue;

        // Between chunks totals lie where the result will be; each element is one thread's.
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (row_end[h] >= 0) {
                i64 head = head_of(tile, row + 8 * h), query = token_of(tile, row + 8 * h) * a.n_head + head;
                i64 part = query * a.n_splits + split;
                float* to = a.parts ? (float*)a.parts + part * DV : (float*)a.y + query * DV;
                float keep = 0.0f, by = 1.0f, final = 1.0f;
                if (a.parts) {
                    if (t == 0 && (WIDE || warp == 0)) ((float2*)a.sums)[part] = make_float2(peak[h], sum[h]);
                } else {
                    merge_sums(total_peak[h], total_sum[h], peak[h], sum[h], keep, by);
                    const float* sink = a.sinks ? (const float*)a.sinks + head : nullptr;
                    if (last) final = finishing(total_peak[h], total_sum[h], sink);
                }
#pragma unroll
                for (int i = 0; i < MINE; i++) {
                    int at_tile = V_OCTETS * (i / PER_PIECE) + (WIDE ? i % PER_PIECE : WARPS * (i % PER_PIECE) + warp);
                    if (at_tile >= min(TILES, V_OCTETS * (i / PER_PIECE + 1))) continue;
                    float2* place = (float2*)(to + 8 * at_tile + 2 * t);
                    float2 x = begun[h] ? *place : make_float2(0.0f, 0.0f);
                    x.x = merged(x.x, keep, o[i][2 * h], by), x.y = merged(x.y, keep, o[i][2 * h + 1], by);
                    *place = a.parts ? make_float2(o[i][2 * h], o[i][2 * h + 1]) : make_float2(x.x * final, x.y * final);
                }
                begun[h] = true;
            }
            peak[h] = -INFINITE, sum[h] = 0.0f;
#pragma unroll
            for (int i = 0; i < MINE; i++) o[i][2 * h] = o[i][2 * h + 1] = 0.0f;
        }
    }
}

// -- merge ------------------------------------------------------------------------------------------------------------

// Parts that are read at once, and columns of one that a lane has.
constexpr int BATCH = 8, WIDTH = DV > 64 ? 4 : DV > 32 ? 2 : 1;
constexpr int STRETCH = WIDTH * WARP, STRETCHES = (DV + STRETCH - 1) / STRETCH;

// With which factors this lane's peak and sum join those before it, of which `before` is the highest peak. `merge_sums` has
// the same.
DEVICE void joined(float before, float peak, float sum, float& keep, float& by) {
    float top = fmaxf(before, peak);
    keep = sum == 0.0f ? 1.0f : rescaled(before, top), by = sum == 0.0f ? 0.0f : rescaled(peak, top);
}

// Parts `first` to `last` of the query that begins `at` a part, PER of them a chunk, in order: columns from `column` on.
// Lanes work out the factors of a part each.
template <int PER>
DEVICE void merge_parts(const Merge& a, int at, int first, int last, int column, float (&total)[WIDTH], float& total_peak,
                        float& total_sum) {
    int mine = threadIdx.x % BATCH, chunk = mine / PER * PER;
    for (int batch = first / PER * PER; batch < last; batch += BATCH) {
        float2 one = make_float2(-INFINITE, 0.0f);
        if (batch + mine >= first && batch + mine < last) one = ((const float2*)a.sums)[at + batch + mine];
        float x[BATCH][WIDTH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const float* from = (const float*)a.parts + ((at + batch) * DV + column) + i * DV;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (batch + i < last && column < DV) {
                if (WIDTH == 4) v = *(const float4*)from;
                else if (WIDTH == 2) v.x = ((const float2*)from)->x, v.y = ((const float2*)from)->y;
                else v.x = *from;
            }
            float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < WIDTH; e++) x[i][e] = four[e];
        }
        // of the part in its chunk
        float seen = one.y == 0.0f ? -INFINITE : one.x, before = -INFINITE, peak = -INFINITE, keep, by, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            float other = __shfl_sync(ALL_LANES, seen, chunk + i);
            if (chunk + i < mine) before = fmaxf(before, other);
            peak = fmaxf(peak, other);
        }
        joined(before, one.x, one.y, keep, by);
        float weighted = one.y * by;
#pragma unroll
        for (int i = 0; i < PER; i++)
            sum = fmaf(sum, __shfl_sync(ALL_LANES, keep, chunk + i), __shfl_sync(ALL_LANES, weighted, chunk + i));
        // of the chunk
        float keep_chunk, by_chunk, highest = total_peak;
        before = total_peak, seen = sum == 0.0f ? -INFINITE : peak;
#pragma unroll
        for (int i = 0; i < BATCH; i += PER) {
            float other = __shfl_sync(ALL_LANES, seen, i);
            if (i < chunk) before = fmaxf(before, other);
            highest = fmaxf(highest, other);
        }
        joined(before, peak, sum, keep_chunk, by_chunk);
        total_peak = highest, weighted = sum * by_chunk;
#pragma unroll
        for (int i = 0; i < BATCH; i += PER) {
            float in_chunk[WIDTH] = {};
#pragma unroll
            for (int j = i; j < i + PER; j++) {
                float k = __shfl_sync(ALL_LANES, keep, j), b = __shfl_sync(ALL_LANES, by, j);
#pragma unroll
                for (int e = 0; e < WIDTH; e++) in_chunk[e] = merged(in_chunk[e], k, x[j][e], b);
            }
            float k = __shfl_sync(ALL_LANES, keep_chunk, i), b = __shfl_sync(ALL_LANES, by_chunk, i);
            total_sum = fmaf(total_sum, k, __shfl_sync(ALL_LANES, weighted, i));
#pragma unroll
            for (int e = 0; e < WIDTH; e++) total[e] = merged(total[e], k, in_chunk[e], b);
        }
    }
}

// Whether this block is the last of its token's to come here; `largest` is then that of all of them, and what they wrote is there.
DEVICE bool last_of(const Merge& a, int token, float& largest, float* room) {
    __shared__ u32 told[2];
    if (a.n_blocks == 1) return true;
    u32* meeting = (u32*)a.meeting + 2 * token;
    __threadfence();
    largest = block_max(largest, room);
    if (threadIdx.x == 0) {
        atomicMax(meeting + 1, __float_as_uint(largest));  // no negative ones: their order is that of their bits
        __threadfence();
        told[0] = atomicAdd(meeting, 1u) == (u32)a.n_blocks - 1;
        __threadfence();
        if (told[0]) told[1] = atomicExch(meeting + 1, 0u), atomicExch(meeting, 0u);
    }
    __syncthreads();
    if (told[0]) largest = __uint_as_float(told[1]);
    return told[0];
}

// `n_blocks` for each token, whose warps take stretches of its heads.
KERNEL(128) merge(Merge a) {
    next_may_come();
    if (!a.given) previous_done();
    __shared__ float room[32];
    int token = blockIdx.x / (int)a.n_blocks, warp = blockIdx.x % (int)a.n_blocks * (blockDim.x / WARP) + threadIdx.x / WARP;
    Seen seen = seen_of(((const i32*)a.n_seen)[token], a.split_pages * a.n_splits, a.window);
    int cells = CELLS * (int)a.split_pages, first = (int)seen.begin / cells, last = ((int)seen.end + cells - 1) / cells;
    if (a.given) previous_done();
    float largest = 0.0f;
    for (int i = warp; i < (int)a.n_head * STRETCHES; i += (int)a.n_blocks * (blockDim.x / WARP)) {
        // Counts fit an int: what parts take is bounded.
        int query = token * (int)a.n_head + i / STRETCHES, column = i % STRETCHES * STRETCH + threadIdx.x % WARP * WIDTH;
        int at = query * (int)a.n_splits;
        float total[WIDTH] = {}, peak = -INFINITE, sum = 0.0f;
        if (a.split_pages == 1) merge_parts<CHUNK_PAGES>(a, at, first, last, column, total, peak, sum);
        else merge_parts<1>(a, at, first, last, column, total, peak, sum);
        float by = finishing(peak, sum, a.sinks ? (const float*)a.sinks + i / STRETCHES : nullptr);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            if (column + e >= DV) continue;
            ((float*)a.y)[query * DV + column + e] = total[e] * by;
            largest = fmaxf(largest, fabsf(total[e] * by));
        }
    }
    if (a.peaks) tell_peak(a.peaks, token, largest);
    if (a.columns && last_of(a, token, largest, room))
        put_column(token, (const float*)a.y + token * a.n_head * DV, a.n_head * DV, largest, a.columns, a.columns_row,
                   a.columns_scales, a.columns_wide, room);
}
