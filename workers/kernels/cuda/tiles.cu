// Products of packed weights with many columns, by matrix instructions: a block makes 128 rows of 128 columns, a warp 32 rows of 64.
// Weights come to registers, a group after the other, and columns to shared memory, which all warps read.
//
// The sums are those of `product`, in the same order: group g belongs to slice g % 8, whose sum is a warp's there. The groups are
// taken slice by slice, and the slices' sums are added in order.

#define ROWS 128
#define COLUMNS 128
#define GROUP_BYTES (64 * GROUP)
#define STAGE_BYTES (COLUMNS * GROUP_BYTES)

// Groups of a row in the order in which they are taken. A slice may have none.
struct Turn {
    int slice, group;
};

DEVICE void advance(Turn& turn, int n_groups) {
    turn.group += N_SLICES;
    while (turn.group >= n_groups && turn.slice < N_SLICES) turn.slice++, turn.group = turn.slice;
}

// Pieces of 16 bytes: of a column's group, chunks 0 and 1, and 2 and 3, change places in odd columns, so that a warp's threads read
// from different banks.
DEVICE int piece_at(int column, int chunk, int t) { return column * GROUP_BYTES + (chunk ^ (column & 1)) * 64 + 16 * t; }

KERNEL(256, 1) tile_product(TileProduct a) {
    ROOM(room, 2 * STAGE_BYTES);
    next_may_come();
    if (!a.fixed) previous_done();
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    i64 n_column_tiles = (a.n + COLUMNS - 1) / COLUMNS, tile = blockIdx.x / n_column_tiles;
    i64 column0 = blockIdx.x % n_column_tiles * COLUMNS;
    int part = part_of(a, (int)tile);
    i64 row0 = (tile - a.begin[part]) * ROWS + warp % 4 * 32;
    int n_groups = (int)(a.k / (32 * GROUP));
    u32 n_chunks = (u32)a.k / 32, all = (u32)a.n_all[part] * n_chunks, before[2];
    for (int m = 0; m < 2; m++) {
        before[m] = (u32)(a.first[part] + row0 + TILE * m) * n_chunks;
        if (before[m] >= all) before[m] = 0;  // some rows; nobody takes what comes of them
    }
    Source source = source_of(planes_of(a.w[part], a.n_all[part], a.k), lane);
    Units units[2][2];
    auto load = [&](int group) {
#pragma unroll
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 2; i++) load_units(source, before[m] + group * (TILE * GROUP), i, units[m][i]);
    };
    // this thread's pieces of columns: the same of every sixteenth
    int piece = threadIdx.x % 16, first = threadIdx.x / 16, last = (int)min((i64)COLUMNS, a.n - column0) - 1;
    const u8* x = held((const u8*)a.x + column0 * a.x_row + 16 * piece);
    u8* to = room + piece_at(first, piece / 4, piece % 4);
    auto bring = [&](int group, int stage) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; i++)
            fetch16(to + stage * STAGE_BYTES + i * 16 * GROUP_BYTES,
                    x + (u32)min(first + 16 * i, last) * (u32)a.x_row + group * GROUP_BYTES);
        end_of_lot();
    };
    const u8* mine = room + piece_at(warp / 4 * 64 + g, 0, t);

    float total[2][8][4] = {}, sums[2][8][4] = {};
    Turn turn = {0, 0}, next = {0, 0};
    load(0);
    previous_done();
    bring(0, 0);
    int stage = 0;
    for (int n = 0; n < n_groups; n++) {
        advance(next, n_groups);
        fetched<0>();
        __syncthreads();
        if (n + 1 < n_groups) bring(next.group, stage ^ 1);
        const u8* here = mine + stage * STAGE_BYTES;
        ScalePair scales[2][2];
#pragma unroll
        for (int c = 0; c < GROUP; c++) {
            u32 low[2][4], high[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                for (int h = 0; h < 2 && c % 2 == 0; h++) scales[m][h] = scale_pair(units[m][h], c / 2, turn.group & 1, t);
                weights(units[m][0], scales[m][0], c, low[m]);
                weights(units[m][1], scales[m][1], c, high[m]);
            }
            if (c == GROUP - 1 && n + 1 < n_groups) load(next.group);
            // the chunk's place is the other of its two in odd columns, of which a thread has all or none
            const u8* chunk = here + ((c ^ (g & 1)) - (g & 1)) * 64;
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
                uint4 b[4];
#pragma unroll
                for (int i = 0; i < 4; i++) b[i] = *(const uint4*)(chunk + (j + i) * 8 * GROUP_BYTES);
#pragma unroll
                for (int m = 0; m < 2; m++)
                    for (int i = 0; i < 4; i++) MULTIPLY(sums[m][j + i], low[m][0], high[m][0], low[m][1], high[m][1], b[i].x, b[i].y);
#pragma unroll
                for (int m = 0; m < 2; m++)
                    for (int i = 0; i < 4; i++) MULTIPLY(sums[m][j + i], low[m][2], high[m][2], low[m][3], high[m][3], b[i].z, b[i].w);
            }
        }
        if (next.slice != turn.slice) {
#pragma unroll
            for (int m = 0; m < 2; m++)
                for (int j = 0; j < 8; j++)
                    for (int e = 0; e < 4; e++) {
                        total[m][j][e] = turn.slice ? total[m][j][e] + sums[m][j][e] : sums[m][j][e];
                        sums[m][j][e] = 0.0f;
                    }
        }
        turn = next;
        stage ^= 1;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        for (int e = 0; e < 2; e++) {
            i64 column = column0 + warp / 4 * 64 + 8 * j + 2 * t + e;
            if (column >= a.n) continue;
            float undo = ((const float*)a.scales)[column] * UNDO;
            float* y = (float*)(a.y[part] + column * a.y_row[part]);
#pragma unroll
            for (int m = 0; m < 2; m++)
                for (int half = 0; half < 2; half++) {
                    i64 row = row0 + TILE * m + g + 8 * half;
                    // slices without groups have added nothing, which changes no sum but that of nothing less than 0
                    if (row < a.n_rows[part]) y[row] = (total[m][j][2 * half + e] + 0.0f) * undo;
                }
        }
}
