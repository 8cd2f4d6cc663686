// Columns in 16 bits, which products read.

// A block makes one: of n float32 at `row`, which its own threads have written or nobody writes; `largest` is the largest magnitude
// that this thread has seen of them. `at`, `column_bytes`, `scales`, `wide`: as `Halve` has them. `room`: 32 floats of shared memory.
DEVICE void put_column(i64 column, const float* row, i64 n, float largest, i64 at, i64 column_bytes, i64 scales, i64 wide, float* room) {
    u16* y = (u16*)(at + column * column_bytes);
    float scale = 1, undo = 1;
    largest = block_max(largest, room);
    if (!wide) {
        // the largest becomes 128 to 256: no half overflows, and none that matters is subnormal
        int exponent = (int)(__float_as_uint(largest) >> 23);
        if (exponent > 16 && exponent < 255) {
            scale = __uint_as_float((u32)(261 - exponent) << 23);
            undo = __uint_as_float((u32)(exponent - 7) << 23);
        }
    }
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
        u16 h[4];
        for (int j = 0; j < 4; j++) h[j] = wide ? bf16_of(v[j]) : half_of(v[j] * scale);
        *(uint2*)(y + i) = make_uint2(pair(h[0], h[1]), pair(h[2], h[3]));
    }
    if (threadIdx.x == 0) ((float*)scales)[column] = undo;
}
