// Rows of float32, each by one block of as many threads as its length asks for. With `vector`, rows are read and written in
// fours that lie together; a row's sums run in the same order wherever it lies.

DEVICE float element(const char* row, i64 step, i64 i) { return *(const float*)(row + i * step); }

// Calls f(i, x[i]) for the thread's elements: fours that lie apart by the block's width.
template <class F>
DEVICE void each(const char* row, i64 step, i64 n, bool vector, F f) {
    for (i64 i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
        float v[4];
        int m = n - i < 4 ? (int)(n - i) : 4;
        if (vector && m == 4) load_floats(F32, row + 4 * i, v);
        else
            for (int j = 0; j < 4; j++) v[j] = j < m ? element(row, step, i + j) : 0.0f;
        for (int j = 0; j < 4; j++)
            if (j < m) f(i + j, v[j]);
    }
}

// The same, and puts what f returns into another row.
template <class F>
DEVICE void rewrite(const char* row, i64 step, char* to, i64 to_step, i64 n, bool vector, F f) {
    for (i64 i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
        float v[4];
        int m = n - i < 4 ? (int)(n - i) : 4;
        if (vector && m == 4) {
            load_floats(F32, row + 4 * i, v);
            for (int j = 0; j < 4; j++) v[j] = f(i + j, v[j]);
            store_floats(F32, to + 4 * i, v);
        } else {
            for (int j = 0; j < m; j++) *(float*)(to + (i + j) * to_step) = f(i + j, element(row, step, i + j));
        }
    }
}

enum Norm_ { NORM, RMS_NORM, L2_NORM };

DEVICE float norm_scale(const Norm& a, float sum) {
    return a.kind == L2_NORM ? 1.0f / fmaxf(sqrtf(sum), a.eps) : 1.0f / sqrtf(sum / (float)a.ne[0] + a.eps);
}

// Where the rows of a norm's block begin.
struct NormRow {
    const char *x, *plus, *w, *z;
    char *sum, *y;
};

template <int N>
DEVICE void kept_norm(const Norm& a, const NormRow& row, float* room) {
    float v[N][4], w[N][4] = {};
    int n = (int)a.ne[0];
    if (a.w && a.w_stays) load_row(row.w, n, w);
    previous_done();
    load_row(row.x, n, v);
    if (a.plus) {
        float u[N][4];
        load_row(row.plus, n, u);
        for (int k = 0; k < N; k++)
            for (int j = 0; j < 4; j++) v[k][j] += u[k][j];
        store_row(row.sum, n, v);
    }
    if (a.w && !a.w_stays) load_row(row.w, n, w);
    float mean = 0.0f, sum = 0.0f;
    if (a.kind == NORM) {
        for (int k = 0; k < N; k++)
            for (int j = 0; j < 4; j++) sum += v[k][j];
        mean = block_sum(sum, room) / (float)n;
        sum = 0.0f;
    }
    for (int k = 0; k < N; k++) {
        bool inside = 4 * (threadIdx.x + k * blockDim.x) < n;
        for (int j = 0; j < 4; j++) {
            v[k][j] = inside ? v[k][j] - mean : 0.0f;
            sum += v[k][j] * v[k][j];
        }
    }
    sum = block_sum(sum, room);
    float scale = norm_scale(a, sum);
    for (int k = 0; k < N; k++)
        for (int j = 0; j < 4; j++) v[k][j] = a.w ? v[k][j] * scale * w[k][j] : v[k][j] * scale;
    if (a.z) {
        load_row(row.z, n, w);
        for (int k = 0; k < N; k++)
            for (int j = 0; j < 4; j++) v[k][j] += w[k][j];
    }
    if (!a.only_columns) store_row(row.y, n, v);
    if (a.columns) put_kept_column(blockIdx.x, v, a.columns, a.columns_row, a.columns_scales, a.columns_wide, room);
}

DEVICE void long_norm(const Norm& a, NormRow row, float* room) {
    previous_done();
    i64 n = a.ne[0];
    if (a.plus) {
        rewrite(row.x, a.x_nb[0], row.sum, a.x_nb[0], n, a.vector, [&](i64 i, float v) {
            return v + element(row.plus, a.x_nb[0], i);
        });
        row.x = row.sum;  // a thread reads what it has written
    }
    float mean = 0.0f, sum = 0.0f, largest = 0.0f;
    if (a.kind == NORM) {
        each(row.x, a.x_nb[0], n, a.vector, [&](i64, float v) { sum += v; });
        mean = block_sum(sum, room) / (float)n;
        sum = 0.0f;
    }
    each(row.x, a.x_nb[0], n, a.vector, [&](i64, float v) { sum += (v - mean) * (v - mean); });
    sum = block_sum(sum, room);
    float scale = norm_scale(a, sum);
    rewrite(row.x, a.x_nb[0], row.y, a.y_nb[0], n, a.vector, [&](i64 i, float v) {
        v = (v - mean) * scale;
        if (a.w) v *= element(row.w, a.w_nb[0], i);
        if (a.z) v += element(row.z, a.z_nb[0], i);
        largest = fmaxf(largest, fabsf(v));
        return v;
    });
    if (!a.columns) return;
    put_column(blockIdx.x, (const float*)row.y, n, largest, a.columns, a.columns_row, a.columns_scales, a.columns_wide, room);
}

KERNEL(1024) norms(Norm a) {
    __shared__ float room[WARP];
    next_may_come();
    u32 r = blockIdx.x;
    i64 of_x = row_offset(r, a.ne, a.x_nb);
    NormRow row = {(const char*)a.x + of_x, (const char*)a.plus + of_x, (const char*)a.w + row_offset(r, a.ne, a.w_nb),
                   (const char*)a.z + row_offset(r, a.ne, a.z_nb), (char*)a.sum + of_x,
                   (char*)a.y + row_offset(r, a.ne, a.y_nb)};
    if (a.vector && a.ne[0] <= 8 * blockDim.x) kept_norm<2>(a, row, room);
    else if (a.vector && a.ne[0] <= 16 * blockDim.x) kept_norm<4>(a, row, room);
    else long_norm(a, row, room);
}

KERNEL(1024) sum_rows(SumRows a) {
    begin();
    __shared__ float room[WARP];
    u32 r = blockIdx.x;
    float sum = 0.0f;
    each((const char*)a.x + row_offset(r, a.ne, a.x_nb), a.x_nb[0], a.ne[0], a.vector, [&](i64, float v) { sum += v; });
    sum = block_sum(sum, room);
    if (threadIdx.x) return;
    if (a.mean) sum /= (float)a.ne[0];
    sum = sum < a.low ? a.low : sum;  // what is no number stays so
    *(float*)((char*)a.y + row_offset(r, a.ne, a.y_nb)) = sum > a.high ? a.high : sum;
}

// In double precision: an error is carried to the end of the row.
KERNEL(1024) cumsum(CumSum a) {
    begin();
    __shared__ double room[WARP];
    u32 r = blockIdx.x;
    const char* x = (const char*)a.x + row_offset(r, a.ne, a.x_nb);
    char* y = (char*)a.y + row_offset(r, a.ne, a.y_nb);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    double before = 0.0;
    for (i64 first = 0; first < a.ne[0]; first += blockDim.x) {
        i64 i = first + threadIdx.x;
        double sum = i < a.ne[0] ? (double)element(x, a.x_nb[0], i) : 0.0;
        for (int step = 1; step < WARP; step *= 2) {
            double left = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += left;
        }
        __syncthreads();
        if (lane == WARP - 1) room[warp] = sum;
        __syncthreads();
        double of_warps = before;
        for (int w = 0; w < n_warps; w++) {
            if (w == warp) sum += of_warps;
            of_warps += room[w];
        }
        before = of_warps;
        if (i < a.ne[0]) *(float*)(y + i * a.y_nb[0]) = (float)sum;
    }
}

KERNEL(1024) soft_max(SoftMax a) {
    begin();
    __shared__ float room[WARP];
    u32 r = blockIdx.x, plane = r / (u32)a.ne[1];
    i64 i1 = r % (u32)a.ne[1], i2 = plane % (u32)a.ne[2], i3 = plane / (u32)a.ne[2];
    const char* x = (const char*)a.x + row_offset(r, a.ne, a.x_nb);
    char* y = (char*)a.y + row_offset(r, a.ne, a.y_nb);
    const char* mask = (const char*)a.mask + i1 * a.mask_nb[1] + i2 % a.mask_ne[2] * a.mask_nb[2] + i3 % a.mask_ne[3] * a.mask_nb[3];
    float slope = 1.0f;
    if (a.max_bias > 0.0f) {
        float exponent = i2 < a.n_log2 ? (float)(i2 + 1) : (float)(2 * (i2 - a.n_log2) + 1) * 0.5f;
        slope = exp2f(-a.max_bias * exponent / (float)a.n_log2);
    }
    auto score = [&](i64 i, float v) {
        v *= a.scale;
        return a.mask ? v + slope * load_float(a.mask_type, mask + i * a.mask_nb[0]) : v;
    };
    float peak = -INFINITE, sum = 0.0f;
    each(x, a.x_nb[0], a.ne[0], a.vector, [&](i64 i, float v) { peak = fmaxf(peak, score(i, v)); });
    peak = block_max(peak, room);
    float sink = a.sinks ? element((const char*)a.sinks, a.sinks_step, i2) : 0.0f;
    if (a.sinks) peak = fmaxf(peak, sink);
    each(x, a.x_nb[0], a.ne[0], a.vector, [&](i64 i, float v) { sum += expf(score(i, v) - peak); });
    sum = block_sum(sum, room);
    if (a.sinks) sum += expf(sink - peak);
    float scale = 1.0f / sum;
    rewrite(x, a.x_nb[0], y, a.y_nb[0], a.ne[0], a.vector, [&](i64 i, float v) { return expf(score(i, v) - peak) * scale; });
}

KERNEL(1024) add_id(AddId a) {
    begin();
    i64 slot = blockIdx.x % (u32)a.ne[1], token = blockIdx.x / (u32)a.ne[1];
    i64 id = *(const i32*)((const char*)a.ids + slot * a.ids_nb[0] + token * a.ids_nb[1]);
    if (id < 0 || id >= a.n_z) {
        if (threadIdx.x == 0) report(a.status, a.node);
        return;
    }
    const char *x = (const char*)a.x + slot * a.x_nb[1] + token * a.x_nb[2], *z = (const char*)a.z + id * a.z_nb[1];
    char* y = (char*)a.y + slot * a.y_nb[1] + token * a.y_nb[2];
    rewrite(x, a.x_nb[0], y, a.y_nb[0], a.ne[0], a.vector, [&](i64 i, float v) { return v + element(z, a.z_nb[0], i); });
}
