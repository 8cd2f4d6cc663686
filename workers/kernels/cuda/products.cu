// Products of packed weights with columns of 16 bits, by matrix instructions; compiled for one FORMAT, and for tiles of 16 * MT rows
// and 8 * NT columns.
//
// A block has eight warps, which take a group of 128 elements in turn, so the first eight groups are eight warps' first; each adds up
// its own in order, and the eight sums are added in order. Every element of the result has the same sums in the same order
// whatever MT and NT are, and whoever its neighbours are.

#define N_WARPS 8

#ifdef MT
// Sums of a tile in registers: of matrix m and columns j, as mma_halves has them.
typedef float Sums[MT][NT][4];

// Rows row0 on, as far as n_rows of them are there, times columns at `columns`: their addresses, 0 where there is none.
DEVICE void multiply(const Planes& p, i64 row0, i64 row_end, const i64 (&columns)[NT], Sums& sums) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    i64 n_groups = (p.n_chunks + GROUP - 1) / GROUP;
    Row rows[MT][2];
    bool there[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
        for (int i = 0; i < 2; i++) {
            i64 row = row0 + TILE * m + g + 8 * i;
            there[m][i] = row < row_end;
            rows[m][i] = row_of(p, there[m][i] ? row : row0);
        }
    for (i64 group = warp; group < n_groups; group += N_WARPS) {
        int n = chunks_of(p, group);
        Units units[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++)
            for (int i = 0; i < 2; i++) load(p, rows[m][i], group, n, t, units[m][i]);
#pragma unroll
        for (int c = 0; c < GROUP; c++) {
            if (c >= n) break;
            uint4 b[NT];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                uint4 zero = {0, 0, 0, 0};
                b[j] = columns[j] ? *(const uint4*)(columns[j] + (group * GROUP + c) * 64 + 16 * t) : zero;
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 low[4], high[4];
                weights(units[m][0], c, (int)(group & 1), t, low);
                weights(units[m][1], c, (int)(group & 1), t, high);
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    MULTIPLY(sums[m][j], low[0], high[0], low[1], high[1], b[j].x, b[j].y);
                    MULTIPLY(sums[m][j], low[2], high[2], low[3], high[3], b[j].z, b[j].w);
                }
            }
        }
    }
}

// The warps' sums added in order: `take(row, column, sum)` for each of the tile's.
template <class Take>
DEVICE void collect(const Sums& sums, const Take& take) {
    __shared__ float room[N_WARPS][8][TILE * MT + 4];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int m = 0; m < MT; m++)
            for (int i = 0; i < 4; i++) room[warp][2 * t + i % 2][TILE * m + g + i / 2 * 8] = sums[m][j][i];
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * TILE * MT; i += N_WARPS * WARP) {
            int column = i / (TILE * MT), row = i % (TILE * MT);
            float sum = room[0][column][row];
            for (int w = 1; w < N_WARPS; w++) sum += room[w][column][row];
            take(row, 8 * j + column, sum);
        }
        __syncthreads();
    }
}

KERNEL(256) product(Product a) {
    begin();
    Planes p = planes_of(a.w, a.n_all, a.k);
    i64 row0 = (i64)blockIdx.x * (TILE * MT), column0 = (i64)blockIdx.y * (8 * NT);
    int g = threadIdx.x % WARP / 4;
    i64 columns[NT];
    for (int j = 0; j < NT; j++) {
        i64 column = column0 + 8 * j + g;
        columns[j] = column < a.n ? a.x + column * a.x_row : 0;
    }
    Sums sums = {};
    multiply(p, a.first + row0, a.first + a.n_rows, columns, sums);
    collect(sums, [&](int row, int column, float sum) {
        i64 r = row0 + row, c = column0 + column;
        if (r < a.n_rows && c < a.n) ((float*)(a.y + c * a.y_row))[r] = sum * (((const float*)a.scales)[c] * UNDO);
    });
}

KERNEL(256) expert_product(ExpertProduct a) {
    begin();
    int4 tile = ((const int4*)a.tiles)[blockIdx.y];
    i64 n = tile.z;
    if (n == 0) return;
    const i32* pairs = (const i32*)a.pairs + tile.y;
    Planes p = planes_of(a.w, a.n_all, a.k);
    i64 row0 = (i64)blockIdx.x * (TILE * MT), first = tile.x * a.n_rows;
    int g = threadIdx.x % WARP / 4;
    i64 columns[NT];
    for (int j = 0; j < NT; j++) {
        int i = 8 * j + g;
        columns[j] = i < n ? a.x + (pairs[i] / a.n_used * a.n_slots + pairs[i] % a.n_used % a.n_slots) * a.x_row : 0;
    }
    Sums sums = {};
    multiply(p, first + row0, first + a.n_rows, columns, sums);
    collect(sums, [&](int row, int column, float sum) {
        i64 r = row0 + row;
        if (r >= a.n_rows || column >= n) return;
        i64 pair = pairs[column], x = pair / a.n_used * a.n_slots + pair % a.n_used % a.n_slots;
        ((float*)(a.y + pair * a.y_row))[r] = sum * (((const float*)a.scales)[x] * UNDO);
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
