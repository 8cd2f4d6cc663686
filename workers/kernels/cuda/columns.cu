// What products read besides weights: columns in 16 bits, and who chose which expert; and products of weights that are not packed.

// A block makes one column.
KERNEL(256) halve(Halve a) {
    __shared__ float room[32];
    begin();
    const float* x = (const float*)(a.x + blockIdx.x * a.x_row);
    float largest = 0;
    for (i64 i = threadIdx.x; i < a.k; i += blockDim.x) largest = fmaxf(largest, fabsf(x[i]));
    put_column(blockIdx.x, x, a.k, largest, a.y, a.y_row, a.scales, a.wide, room);
}

// One block; a warp takes an expert at a time, so the list is in order whoever is first.
#define MAX_EXPERTS 1024
KERNEL(1024) route(Route a) {
    begin();
    __shared__ i32 counts[MAX_EXPERTS], first_pair[MAX_EXPERTS], first_tile[MAX_EXPERTS];
    __shared__ i32 n_tiles;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warps = blockDim.x / WARP;
    i64 n_pairs = a.n_used * a.n_tokens;
    for (i64 i = threadIdx.x; i < n_pairs; i += blockDim.x) {
        i32 id = *(const i32*)(a.ids + i / a.n_used * a.ids_row + i % a.n_used * 4);
        if (id < 0 || id >= a.n_experts) report(a.status, a.node);
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int e = warp; e < a.n_experts; e += n_warps) {
            int n = 0;
            for (i64 i = lane; i < (n_pairs + WARP - 1) / WARP * WARP; i += WARP) {
                i64 token = i / a.n_used;
                bool mine = i < n_pairs && *(const i32*)(a.ids + token * a.ids_row + (i - token * a.n_used) * 4) == e;
                u32 chosen = __ballot_sync(ALL_LANES, mine);
                if (pass && mine) ((i32*)a.pairs)[first_pair[e] + n + __popc(chosen & ((1u << lane) - 1))] = (i32)i;
                n += __popc(chosen);
            }
            if (!pass && lane == 0) counts[e] = n;
        }
        __syncthreads();
        if (!pass && threadIdx.x == 0) {
            i32 pairs = 0, tiles = 0;
            for (int e = 0; e < a.n_experts; e++) {
                first_pair[e] = pairs, first_tile[e] = tiles;
                pairs += counts[e];
                tiles += (counts[e] + (i32)a.n_columns - 1) / (i32)a.n_columns;
            }
            n_tiles = tiles;
        }
        __syncthreads();
    }
    int4* tiles = (int4*)a.tiles;
    for (int e = threadIdx.x; e < a.n_experts; e += blockDim.x) {
        for (i32 at = 0, i = first_tile[e]; at < counts[e]; at += (i32)a.n_columns, i++) {
            i32 left = counts[e] - at;
            tiles[i] = make_int4(e, first_pair[e] + at, left < a.n_columns ? left : (i32)a.n_columns, 0);
        }
    }
    for (i64 i = n_tiles + threadIdx.x; i < a.n_tiles; i += blockDim.x) tiles[i] = make_int4(0, 0, 0, 0);
}

DEVICE float element(i64 at, i64 type) {
    if (type == 0) return *(const float*)at;
    u16 h = *(const u16*)at;
    return type == 1 ? float_of_half(h) : float_of_bf16(h);
}

// A warp makes one element: weights of any strides, 0 float32, 1 float16, 2 bfloat16.
KERNEL(256) plain_product(PlainProduct a) {
    begin();
    i64 i = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (i >= a.n[0] * a.n[1] * a.n[2] * a.n[3]) return;
    int lane = threadIdx.x % WARP;
    i64 at[4];
    for (int d = 0; d < 4; d++) at[d] = i % a.n[d], i /= a.n[d];
    i64 w = a.w + at[0] * a.w_nb[1] + at[2] / a.repeat2 * a.w_nb[2] + at[3] / a.repeat3 * a.w_nb[3];
    i64 x = a.x + at[1] * a.x_nb[1] + at[2] * a.x_nb[2] + at[3] * a.x_nb[3];
    float sum = 0;
    for (i64 k = lane; k < a.k; k += WARP) sum = fmaf(element(w + k * a.w_nb[0], a.w_type), element(x + k * a.x_nb[0], a.x_type), sum);
    sum = warp_sum(sum);
    if (lane == 0) *(float*)(a.y + at[0] * a.y_nb[0] + at[1] * a.y_nb[1] + at[2] * a.y_nb[2] + at[3] * a.y_nb[3]) = sum;
}
