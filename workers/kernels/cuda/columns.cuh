// Columns in 16 bits, which products read.

// What the numbers of a column are times, and what undoes it.
struct ColumnScale {
    float scale, undo;
};

DEVICE ColumnScale scale_by(float largest, i64 wide) {
    // the largest becomes 128 to 256: no half overflows, and none that matters is subnormal
    int exponent = (int)(__float_as_uint(largest) >> 23);
    if (wide || exponent <= 16 || exponent >= 255) return {1, 1};
    return {__uint_as_float((u32)(261 - exponent) << 23), __uint_as_float((u32)(exponent - 7) << 23)};
}

// For all threads of a block, of which each has seen a largest magnitude. `room`: 32 floats of shared memory.
DEVICE ColumnScale column_scale(float largest, i64 wide, float* room) { return scale_by(block_max(largest, room), wide); }

// A warp's largest magnitude becomes its row's, where that is not larger; `peaks` has the bits, whose order is that of what they are of.
DEVICE void tell_peak(i64 peaks, i64 row, float largest) {
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) atomicMax((u32*)peaks + row, __float_as_uint(largest));
}

DEVICE uint2 four_of_column(const float (&v)[4], float scale, i64 wide) {
    u16 h[4];
    for (int j = 0; j < 4; j++) h[j] = wide ? bf16_of(v[j]) : half_of(v[j] * scale);
    return make_uint2(pair(h[0], h[1]), pair(h[2], h[3]));
}

// A block makes one: of n float32 at `row`, which its own threads have written or nobody writes; `largest` is the largest magnitude
// that this thread has seen of them. `at`, `column_bytes`, `scales`, `wide`: as `Halve` has them. `room`: 32 floats of shared memory.
DEVICE void put_column(i64 column, const float* row, i64 n, float largest, i64 at, i64 column_bytes, i64 scales, i64 wide, float* room) {
    u16* y = (u16*)(at + column * column_bytes);
    ColumnScale by = column_scale(largest, wide, room);
    i64 width = column_bytes / 2;
    bool whole = n % 4 == 0 && (i64)row % 16 == 0;
    for (i64 i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        float v[4] = {};
        if (whole && i < n) {
            float4 x = *(const float4*)(row + i);
            v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
        } else {
            for (int j = 0; j < 4; j++) v[j] = i + j < n ? row[i + j] : 0.0f;
        }
        *(uint2*)(y + i) = four_of_column(v, by.scale, wide);
    }
    if (threadIdx.x == 0) ((float*)scales)[column] = by.undo;
}

// The same of a row that the block's threads keep: thread t has the four at 4 (t + i blockDim.x), and zeros behind the row's end.
template <int N>
DEVICE void put_kept_column(i64 column, const float (&v)[N][4], i64 at, i64 column_bytes, i64 scales, i64 wide, float* room) {
    u16* y = (u16*)(at + column * column_bytes);
    float largest = 0;
    for (int k = 0; k < N; k++)
        for (int j = 0; j < 4; j++) largest = fmaxf(largest, fabsf(v[k][j]));
    ColumnScale by = column_scale(largest, wide, room);
    int width = (int)(column_bytes / 2);
    for (int k = 0; k < N; k++) {
        int i = 4 * (threadIdx.x + k * blockDim.x);
        if (i < width) *(uint2*)(y + i) = four_of_column(v[k], by.scale, wide);
    }
    for (int i = 4 * (threadIdx.x + N * blockDim.x); i < width; i += 4 * blockDim.x) *(uint2*)(y + i) = make_uint2(0, 0);
    if (threadIdx.x == 0) ((float*)scales)[column] = by.undo;
}
