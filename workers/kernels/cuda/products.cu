// Products of packed weights with columns of 16 bits, by matrix instructions; compiled for one FORMAT, for tiles of 16 * MT rows and
// 8 * NT columns, with STAGED where columns are read from shared memory, and with REST where rows are not in whole tiles of 16 or their
// elements not in whole groups.
//
// A block has eight warps, which take a group of 128 elements in turn, so the first eight groups are eight warps' first; each adds up
// its own in order, and the eight sums are added in order. Every element of the result has the same sums in the same order
// whatever MT and NT are, and whoever its neighbours are. A block takes tiles of rows one after the other, and a warp has the weights
// of its next groups on their way, also those of the next tile, and before the kernel in front is done.

#define N_WARPS N_SLICES
#ifndef STAGED
#define STAGED 0
#endif

#ifdef MT
constexpr int SCALE_WORDS = SUPER ? SCALE_BYTES / 4 : SCALE_BYTES;
constexpr int UNIT_WORDS =
    (WORD_BYTES + BYTE_BYTES + NIBBLE_BYTES + TWO_BYTES + ONE_BYTES) / 4 + SCALE_WORDS + (MORE_BYTES ? 1 : 0);
// Groups of a warp that are on their way at once: as registers have room for them when BLOCKS blocks share a processor.
constexpr int AHEAD_WORDS = (BLOCKS == 1 ? 96 : 64) / (NT < 4 && !REST ? 1 : 2);
constexpr int FITS = AHEAD_WORDS / (2 * MT * UNIT_WORDS), AHEAD = FITS >= 4 ? 4 : FITS >= 2 ? 2 : 1;

// Sums of a tile in registers: of matrix m and columns j, as mma_halves has them.
typedef float Sums[MT][NT][4];

// Rows of a packed tensor from `row` on, a multiple of 16; `part`: which of the launch's tensors.
struct Rows {
    int part;
    i64 w, n_all, row;
};

// Whole tiles of 16 rows are read ahead, whole groups of them.
DEVICE bool whole_tile(const Rows& rows) { return !REST || rows.n_all % TILE == 0; }

// What is read next: chunks of the rows before those of a tile, and of all rows.
struct Ahead {
    int part;
    bool whole;
    Source source;
    u32 before, all;
};

DEVICE void seek(Ahead& ahead, const Rows& rows, i64 k, u32 lane) {
    u32 n_chunks = (u32)k / 32;
    if (rows.part != ahead.part) {
        ahead.part = rows.part;
        ahead.source = source_of(planes_of(rows.w, rows.n_all, k), (int)lane);
        ahead.all = (u32)rows.n_all * n_chunks;
    }
    ahead.whole = whole_tile(rows);
    ahead.before = (u32)rows.row * n_chunks;
}

DEVICE void load_ahead(const Ahead& ahead, u32 group, i64 k, Units (&to)[MT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        u32 before = ahead.before + m * TILE * ((u32)k / 32);
        if (m && before >= ahead.all) before = ahead.before;  // some rows; nobody takes what comes of them
        for (int i = 0; i < 2; i++) load_units(ahead.source, before + group * (TILE * GROUP), i, to[m][i]);
    }
}

// Adds a group's products with the columns at `columns`, where the thread's part of them begins.
DEVICE void add_group(const Units (&units)[MT][2], u32 group, int n, int t, const u8* const (&columns)[NT], Sums& sums) {
    int odd = (int)(group & 1);
    ScalePair scales[MT][2];
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
        if (c >= n) break;
        uint4 b[NT];
#pragma unroll
        for (int j = 0; j < NT; j++) b[j] = *(const uint4*)(columns[j] + group * (64 * GROUP) + c * 64);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            u32 low[4], high[4];
            for (int h = 0; h < 2 && c % 2 == 0; h++) scales[m][h] = scale_pair(units[m][h], c / 2, odd, t);
            weights(units[m][0], scales[m][0], c, low);
            weights(units[m][1], scales[m][1], c, high);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                MULTIPLY(sums[m][j], low[0], high[0], low[1], high[1], b[j].x, b[j].y);
                MULTIPLY(sums[m][j], low[2], high[2], low[3], high[3], b[j].z, b[j].w);
            }
        }
    }
}

// The warps' sums added in order: `take(row, column, sum)` for each of the tile's in the first n_columns.
template <class Take>
DEVICE void collect(const Sums& sums, i64 n_columns, const Take& take) {
    __shared__ float room[N_WARPS][8][TILE * MT + 4];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        if (8 * j >= n_columns) break;
#pragma unroll
        for (int m = 0; m < MT; m++)
            for (int i = 0; i < 4; i++) room[warp][2 * t + i % 2][TILE * m + g + i / 2 * 8] = sums[m][j][i];
        __syncthreads();
        int n = (n_columns - 8 * j < 8 ? (int)(n_columns - 8 * j) : 8) * TILE * MT;
        for (int i = threadIdx.x; i < n; i += N_WARPS * WARP) {
            int column = i / (TILE * MT), row = i % (TILE * MT);
            float sum = room[0][column][row];
            for (int w = 1; w < N_WARPS; w++) sum += room[w][column][row];
            take(row, 8 * j + column, sum);
        }
        __syncthreads();
    }
}

// n_tiles tiles of rows, `tile(i)` the i-th, times n_columns columns; `wait()` before anything is read but weights, `take(i, row,
// column, sum)` for each sum.
template <class Tile, class Wait, class Take>
DEVICE void multiply(
    i64 k, int n_tiles, const Tile& tile, const Wait& wait, const u8* const (&columns)[NT], i64 n_columns, const Take& take) {
    u32 warp = held(threadIdx.x / WARP), lane = held(threadIdx.x % WARP);
    int t = (int)(lane % 4);
    u32 n_whole = (u32)(k / (32 * GROUP));
    // a warp's turns for a tile, as many as make every tile begin with the first of `units`
    u32 turns = (n_whole + N_WARPS * AHEAD - 1) / (N_WARPS * AHEAD) * AHEAD;
    Units units[AHEAD][MT][2];
    Ahead ahead = {-1};
    int next_tile = 0;
    u32 next_turn = 0;
    auto load_next = [&](Units(&to)[MT][2]) {
        if (next_tile >= n_tiles) return;
        if (next_turn == 0) seek(ahead, tile(next_tile), k, lane);
        u32 group = warp + N_WARPS * next_turn;
        if ((!REST || ahead.whole) && group < n_whole) load_ahead(ahead, group, k, to);
        if (++next_turn == turns) next_tile++, next_turn = 0;
    };
    if (turns) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) load_next(units[j]);
    }
    wait();
    for (int i = 0; i < n_tiles; i++) {
        Sums sums = {};
        for (u32 turn = 0; turn < turns; turn += AHEAD) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                u32 group = warp + N_WARPS * (turn + j);
                if ((!REST || whole_tile(tile(i))) && group < n_whole) add_group(units[j], group, GROUP, t, columns, sums);
                load_next(units[j]);
            }
        }
#if REST
        // what is not read ahead: a last group of fewer chunks, and tiles of fewer rows
        Rows rows = tile(i);
        bool whole = whole_tile(rows);
        u32 n_groups = (u32)((k / 32 + GROUP - 1) / GROUP);
        for (u32 group = whole ? n_whole + (warp - n_whole) % N_WARPS : warp; group < n_groups; group += N_WARPS) {
            Planes p = planes_of(rows.w, rows.n_all, k);
            int n = chunks_of(p, group);
            Units few[MT][2];
#pragma unroll
            for (int m = 0; m < MT; m++)
                for (int h = 0; h < 2; h++) {
                    i64 row = rows.row + TILE * m + lane / 4 + 8 * h;
                    load(p, row_of(p, row < rows.n_all ? row : rows.row), group, n, t, few[m][h]);
                }
            add_group(few, group, n, t, columns, sums);
        }
#endif
        collect(sums, n_columns, [&](int row, int column, float sum) { take(i, row, column, sum); });
    }
}

// Columns that are brought to shared memory take so many bytes at most (`STAGED_BYTES` in products.py).
#define STAGED_BYTES 32768

DEVICE ColumnScale scale_of_rows(const Product& a, i64 column) {
    return scale_by(__uint_as_float(((const u32*)a.peaks)[column]), IS(BF16));
}

// Columns are made of rows, as `put_column` makes them.
DEVICE void stage_rows(const Product& a, u8* staged) {
    const int SOME = 4;
    for (int c = 0; c < (int)a.n; c++) {
        const float* row = (const float*)a.rows + c * a.k;
        float scale = scale_of_rows(a, c).scale;
        for (int first = 4 * threadIdx.x; first < (int)a.k; first += SOME * 4 * blockDim.x) {
            float v[SOME][4];
#pragma unroll
            for (int j = 0; j < SOME; j++) {
                int i = first + j * 4 * blockDim.x;
                float4 four = i < (int)a.k ? *(const float4*)(row + i) : make_float4(0, 0, 0, 0);
                v[j][0] = four.x, v[j][1] = four.y, v[j][2] = four.z, v[j][3] = four.w;
            }
#pragma unroll
            for (int j = 0; j < SOME; j++) {
                int i = first + j * 4 * blockDim.x;
                if (i < (int)a.k) *(uint2*)(staged + c * a.x_row + 2 * i) = four_of_column(v[j], scale, IS(BF16));
            }
        }
    }
}

KERNEL(256, BLOCKS) product(Product a) {
    ROOM(staged, STAGED_BYTES);
    next_may_come();
    if (!a.fixed) previous_done();
    i64 column0 = (i64)blockIdx.y * (8 * NT), left = a.n - column0;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const u8* columns[NT];
    // those beyond the last are the last again; nobody takes what comes of them
    for (int j = 0; j < NT; j++)
#if STAGED
        columns[j] = staged + held((u32)(min((i64)(8 * j + g), left - 1) * a.x_row + 16 * t));
#else
        columns[j] = held((const u8*)a.x + (column0 + min((i64)(8 * j + g), left - 1)) * a.x_row + 16 * t);
#endif
    multiply(
        a.k, (int)((a.n_tiles - blockIdx.x + gridDim.x - 1) / gridDim.x),
        [&](int i) {
            int tile = blockIdx.x + i * gridDim.x, part = part_of(a, tile);
            return Rows{part, a.w[part], a.n_all[part], a.first[part] + (tile - (int)a.begin[part]) * (TILE * MT)};
        },
        [&] {
            previous_done();
#if STAGED
            if (a.rows) {
                stage_rows(a, staged);
            } else {
                // each warp reads a part of a column of its own: brought at once they take one way to memory and not one for each group
                for (int i = 16 * threadIdx.x; i < a.n * a.x_row; i += 16 * blockDim.x) fetch16(staged + i, (const u8*)a.x + i);
                end_of_lot();
                fetched<0>();
            }
            __syncthreads();
#endif
        },
        columns, left,
        [&](int i, int row, int column, float sum) {
            int tile = blockIdx.x + i * gridDim.x, part = part_of(a, tile);
            i64 c = column0 + column, r = (tile - (int)a.begin[part]) * (TILE * MT) + row;
            float undo = a.rows ? scale_of_rows(a, c).undo : ((const float*)a.scales)[c];
            if (r < a.n_rows[part]) ((float*)(a.y[part] + c * a.y_row[part]))[r] = sum * (undo * UNDO);
        });
}

KERNEL(256, BLOCKS) expert_product(ExpertProduct a) {
    begin();
    int4 entry = ((const int4*)a.tiles)[blockIdx.y];
    i64 n = entry.z;
    if (n == 0) return;
    const i32* pairs = (const i32*)a.pairs + entry.y;
    i64 row0 = (i64)blockIdx.x * (TILE * MT), first = entry.x * a.n_rows;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    auto column_of = [&](i64 pair) { return pair / a.n_used * a.n_slots + pair % a.n_used % a.n_slots; };
    const u8* columns[NT];
    for (int j = 0; j < NT; j++)
        columns[j] = held((const u8*)(a.x + column_of(pairs[min((i64)(8 * j + g), n - 1)]) * a.x_row) + 16 * t);
    multiply(
        a.k, 1, [&](int) { return Rows{0, a.w, a.n_all, first + row0}; }, [] {}, columns, n,
        [&](int, int row, int column, float sum) {
            i64 r = row0 + row, pair = pairs[column];
            if (r < a.n_rows) ((float*)(a.y + pair * a.y_row))[r] = sum * (((const float*)a.scales)[column_of(pair)] * UNDO);
        });
}
#endif

// A warp takes a row; a thread one element of a chunk.
KERNEL(128) get_rows(GetWeightRows a) {
    begin();
    i64 i = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP, t = lane / 8, e = lane % 8;
    if (i >= a.n) return;
    i32 id = *(const i32*)(a.ids + i * a.id_step);
    if (id < 0 || id >= a.n_rows) {
        if (lane == 0) report(a.status, a.node);
        return;
    }
    Planes p = planes_of(a.w, a.n_all, a.k);
    Row r = row_of(p, a.first + id);
    float* y = (float*)(a.y + i * a.y_row);
    for (i64 chunk = (i64)blockIdx.y; chunk < p.n_chunks; chunk += gridDim.y) {
        i64 group = chunk / GROUP;
        int c = (int)(chunk % GROUP);
#if CODES
        int shift = e / 2 + e % 2 * 4, code = 0;
        if (BYTE_BYTES) code = p.codes[unit_at(p, r, group, c, t, 8) + e] ^ 0x80;
        if (NIBBLE_BYTES) code = *(const u32*)(p.codes + unit_at(p, r, group, c, t, 4)) >> 4 * shift & 15;
        if (TWO_BYTES)
            code |= (*(const u16*)(p.twos + unit_at(p, r, group, c, t, 2)) >> 2 * shift & 3) << (NIBBLE_BYTES ? 4 : 0);
        if (ONE_BYTES) code |= (p.ones[unit_at(p, r, group, c, t, 1)] >> shift & 1) << (NIBBLE_BYTES ? 4 : 2);
        Scale s = scale_of(p.scales + scale_at(p, r, chunk, SCALE_BYTES), p.more + scale_at(p, r, chunk, MORE_BYTES),
                           (int)(chunk % BLOCK_CHUNKS), t / 2);
#if HAS_TABLE
        y[32 * chunk + lane] = s.scale * (float)table(code);
#else
        y[32 * chunk + lane] = s.scale * (float)(code - ZERO) - s.min;
#endif
#else
        u16 word = ((const u16*)(p.codes + unit_at(p, r, group, c, t, 16)))[e];
        y[32 * chunk + lane] = IS(F16) ? float_of_half(word) : float_of_bf16(word);
#endif
    }
}
