// Products of packed weights with columns of 16 bits, by matrix instructions; compiled for one FORMAT, and for tiles of 16 * MT rows
// and 8 * NT columns.
//
// A block has eight warps, which take a group of 128 elements in turn, so the first eight groups are eight warps' first; each adds up
// its own in order, and the eight sums are added in order. Every element of the result has the same sums in the same order
// whatever MT and NT are, and whoever its neighbours are.

#define N_WARPS 8
#if IS(BF16)
#define MULTIPLY mma_bf16s
#else
#define MULTIPLY mma_halves
#endif

// Scales are taken 64 times as large: weights of trained models would else have halves that are subnormal.
#define LARGER 64.0f
#define UNDO (CODES ? 1 / LARGER : 1.0f)

// What a thread reads of a row's group: its units of four chunks, and their scales.
struct Units {
#if WORD_BYTES
    u32 words[16];
#elif BYTE_BYTES
    u32 bytes[8];
#endif
#if NIBBLE_BYTES
    u32 nibbles[4];
#endif
#if TWO_BYTES
    u32 twos[2];
#endif
#if ONE_BYTES
    u32 ones;
#endif
#if CODES
    u32 scales[4];
    u32 more;
#endif
};

#define SET16(to, at)                                        \
    {                                                        \
        uint4 v = stream16(at);                              \
        (to)[0] = v.x, (to)[1] = v.y, (to)[2] = v.z, (to)[3] = v.w; \
    }

// All four chunks are there: whole words.
DEVICE void load_group(const Planes& p, const Row& r, i64 group, int t, Units& u) {
#if WORD_BYTES
    for (int c = 0; c < GROUP; c++) SET16(u.words + 4 * c, p.codes + unit_at(p, r, group, c, t, 16));
#elif BYTE_BYTES
    for (int i = 0; i < 2; i++) SET16(u.bytes + 4 * i, p.codes + unit_at(p, r, group, 2 * i, t, 8));
#endif
#if NIBBLE_BYTES
    SET16(u.nibbles, p.codes + unit_at(p, r, group, 0, t, 4));
#endif
#if TWO_BYTES
    uint2 twos = *(const uint2*)(p.twos + unit_at(p, r, group, 0, t, 2));
    u.twos[0] = twos.x, u.twos[1] = twos.y;
#endif
#if ONE_BYTES
    u.ones = *(const u32*)(p.ones + unit_at(p, r, group, 0, t, 1));
#endif
#if CODES && !SUPER
    const u8* scales = p.scales + scale_at(p, r, group * GROUP, SCALE_BYTES);
#if SCALE_BYTES == 1
    u.scales[0] = *(const u32*)scales;
#elif SCALE_BYTES == 2
    uint2 v = *(const uint2*)scales;
    u.scales[0] = v.x, u.scales[1] = v.y;
#else
    SET16(u.scales, scales);
#endif
#endif
}

// Fewer chunks are there, of a row that is no multiple of a group: unit by unit.
DEVICE void load_part(const Planes& p, const Row& r, i64 group, int n, int t, Units& u) {
#if TWO_BYTES
    u.twos[0] = u.twos[1] = 0;
#endif
#if ONE_BYTES
    u.ones = 0;
#endif
#if CODES && !SUPER
    for (int i = 0; i < 4; i++) u.scales[i] = 0;
#endif
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
#if WORD_BYTES
        uint4 zero = {0, 0, 0, 0};
        uint4 v = c < n ? *(const uint4*)(p.codes + unit_at(p, r, group, c, t, 16)) : zero;
        u.words[4 * c] = v.x, u.words[4 * c + 1] = v.y, u.words[4 * c + 2] = v.z, u.words[4 * c + 3] = v.w;
#elif BYTE_BYTES
        uint2 zero = {0, 0};
        uint2 v = c < n ? *(const uint2*)(p.codes + unit_at(p, r, group, c, t, 8)) : zero;
        u.bytes[2 * c] = v.x, u.bytes[2 * c + 1] = v.y;
#endif
#if NIBBLE_BYTES
        u.nibbles[c] = c < n ? *(const u32*)(p.codes + unit_at(p, r, group, c, t, 4)) : 0;
#endif
#if TWO_BYTES
        if (c < n) u.twos[c / 2] |= (u32) * (const u16*)(p.twos + unit_at(p, r, group, c, t, 2)) << 16 * (c % 2);
#endif
#if ONE_BYTES
        if (c < n) u.ones |= (u32)p.ones[unit_at(p, r, group, c, t, 1)] << 8 * c;
#endif
#if CODES && !SUPER
        if (c < n) {
            const u8* scales = p.scales + scale_at(p, r, group * GROUP + c, SCALE_BYTES);
            for (int i = 0; i < SCALE_BYTES; i++)
                u.scales[(c * SCALE_BYTES + i) / 4] |= (u32)scales[i] << 8 * ((c * SCALE_BYTES + i) % 4);
        }
#endif
    }
}

DEVICE void load(const Planes& p, const Row& r, i64 group, int n, int t, Units& u) {
    if (n == GROUP)
        load_group(p, r, group, t, u);
    else
        load_part(p, r, group, n, t, u);
#if SUPER
    const u8* scales = p.scales + scale_at(p, r, group * GROUP, SCALE_BYTES);
#if SCALE_BYTES == 16
    SET16(u.scales, scales);
#elif SCALE_BYTES == 12
    for (int i = 0; i < 3; i++) u.scales[i] = ((const u32*)scales)[i];
#else
    uint2 v = *(const uint2*)scales;
    u.scales[0] = v.x, u.scales[1] = v.y;
#endif
#if MORE_BYTES
    const u8* more = p.more + scale_at(p, r, group * GROUP, MORE_BYTES);
    u.more = MORE_BYTES == 2 ? (u32) * (const u16*)more : *(const u32*)more;
#endif
#endif
}

#if CODES
DEVICE u32 byte_of(const u32 (&words)[4], int i) { return words[i / 4] >> 8 * (i % 4) & 255; }

// Scale and minimum of a thread's units of chunk c of a group; odd: the second group of a block of 256.
DEVICE Scale unit_scale(const Units& u, int c, int odd, int t) {
    u8 scales[16], more[4];
#if SUPER
    for (int i = 0; i < SCALE_BYTES; i++) scales[i] = (u8)byte_of(u.scales, i);
    for (int i = 0; i < MORE_BYTES; i++) more[i] = (u8)(u.more >> 8 * i);
    // both are worked out, so that no index into registers depends on the group
    Scale low = scale_of(scales, more, c, 0), high = scale_of(scales, more, c + GROUP, 0);
    if (SCALE_BYTES != 8 && !IS(Q4_K) && !IS(Q5_K)) {
        Scale low1 = scale_of(scales, more, c, 1), high1 = scale_of(scales, more, c + GROUP, 1);
        low.scale = t < 2 ? low.scale : low1.scale, high.scale = t < 2 ? high.scale : high1.scale;
        low.min = t < 2 ? low.min : low1.min, high.min = t < 2 ? high.min : high1.min;
    }
    low.scale = odd ? high.scale : low.scale, low.min = odd ? high.min : low.min;
    return low;
#else
    for (int i = 0; i < SCALE_BYTES; i++) scales[i] = (u8)byte_of(u.scales, c * SCALE_BYTES + i);
    return scale_of(scales, more, 0, 0);
#endif
}

// The pair i of codes of chunk c, each as a half from 1024 on.
DEVICE void code_pairs(const Units& u, int c, u32 (&v)[4]) {
#if HAS_TABLE
    u32 which = u.nibbles[c], far = (which & 0x88888888u) >> 1 | 0x32103210u;
    u32 low = which & 0x77777777u, high = low >> 16;
    u32 even = choose_bytes(choose_bytes(TABLE_0, TABLE_1, low), choose_bytes(TABLE_2, TABLE_3, low), far);
    u32 odd = choose_bytes(choose_bytes(TABLE_0, TABLE_1, high), choose_bytes(TABLE_2, TABLE_3, high), far >> 16);
    for (int i = 0; i < 4; i++) v[i] = (choose_bytes(even, odd, (u32)(i | i << 4 | (4 + i) << 8 | i << 12)) & 0x00ff00ffu) | 0x64006400u;
#elif BYTE_BYTES
    for (int i = 0; i < 4; i++)
        v[i] = choose_bytes(u.bytes[2 * c + i / 2] ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342u : 0x4140u);
#else
#if TWO_BYTES
    u32 two = u.twos[c / 2] >> 16 * (c % 2);
    two = (two & 255) | (two & 0xff00u) << 8;
#endif
#if ONE_BYTES
    u32 one = u.ones >> 8 * c;
    one = (one & 15) | (one & 0xf0u) << 12;
#endif
    for (int i = 0; i < 4; i++) {
        v[i] = 0x64006400u;
#if NIBBLE_BYTES
        v[i] |= u.nibbles[c] >> 4 * i & 0x000f000fu;
#endif
#if TWO_BYTES
        v[i] |= (two >> 2 * i & 0x00030003u) << (NIBBLE_BYTES ? 4 : 0);
#endif
#if ONE_BYTES
        v[i] |= (one >> i & 0x00010001u) << (NIBBLE_BYTES ? 4 : 2);
#endif
    }
#endif
}
#endif

// The eight weights of a thread's unit of chunk c, as pairs.
DEVICE void weights(const Units& u, int c, int odd, int t, u32 (&v)[4]) {
#if WORD_BYTES
    for (int i = 0; i < 4; i++) v[i] = u.words[4 * c + i];
#else
    Scale s = unit_scale(u, c, odd, t);
    u32 scale = halves_of(s.scale * LARGER, s.scale * LARGER);
    u32 zero = halves_of(1024.0f + (HAS_TABLE ? 128 : ZERO), 1024.0f + (HAS_TABLE ? 128 : ZERO));
    code_pairs(u, c, v);
    for (int i = 0; i < 4; i++) {
        v[i] = sub_halves(v[i], zero);
#if HAS_MIN
        v[i] = fma_halves(v[i], scale, halves_of(-s.min * LARGER, -s.min * LARGER));
#else
        v[i] = mul_halves(v[i], scale);
#endif
    }
#endif
}

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
