// Gated rows: a block makes one, and the column of it; with `peaks` it makes a piece, a four for each thread. KIND: the function, as
// `Gate` has it.

KERNEL(1024) gate(Gate a) {
    __shared__ float room[WARP];
    begin();
    u32 r = blockIdx.x;
    const char *x = (const char*)a.x + row_offset(r, a.ne, a.x_nb), *z = (const char*)a.z + row_offset(r, a.ne, a.z_nb);
    char* y = (char*)a.y + row_offset(r, a.ne, a.y_nb);
    int n = (int)a.ne[0];
    if (a.peaks) {
        int i = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
        float v[4] = {}, w[4];
        if (i < n) {
            load_floats(F32, x + 4 * i, v);
            load_floats(F32, z + 4 * i, w);
            combine(KIND, a.p0, a.p1, v, w);
            store_floats(F32, y + 4 * i, v);
        }
        float largest = 0.0f;
        for (int j = 0; j < 4; j++) largest = fmaxf(largest, fabsf(v[j]));
        tell_peak(a.peaks, r, largest);
        return;
    }
    const int N = 4;
    if (n <= 4 * N * blockDim.x) {
        float v[N][4], w[N][4];
        load_row(x, n, v);
        load_row(z, n, w);
        for (int k = 0; k < N; k++)
            if (4 * (threadIdx.x + k * blockDim.x) < n) combine(KIND, a.p0, a.p1, v[k], w[k]);
        if (!a.only_columns) store_row(y, n, v);
        if (a.columns) put_kept_column(r, v, a.columns, a.columns_row, a.columns_scales, a.columns_wide, room);
        return;
    }
    float largest = 0;
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
        float v[4], w[4];
        load_floats(F32, x + 4 * i, v);
        load_floats(F32, z + 4 * i, w);
        combine(KIND, a.p0, a.p1, v, w);
        for (int j = 0; j < 4; j++) largest = fmaxf(largest, fabsf(v[j]));
        store_floats(F32, y + 4 * i, v);
    }
    if (!a.columns) return;
    put_column(r, (const float*)y, n, largest, a.columns, a.columns_row, a.columns_scales, a.columns_wide, room);
}
