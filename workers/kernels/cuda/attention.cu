// Attention of any types and shapes, a block for a query: over pages of cells, or over cells that lie together.
// A query's softmax runs over its cells in order, 64 at a time.

#define MAX_ROW 1024
#define WARPS 4

// Element i of a row of a type, by GGUF's number.
DEVICE float element(const char* row, i64 type, i64 i) {
    switch (type) {
        case 0: return ((const float*)row)[i];
        case 1: return float_of_half(((const u16*)row)[i]);
        case 30: return float_of_bf16(((const u16*)row)[i]);
        case 8: {
            const char* block = row + 34 * (i / 32);
            return float_of_half(*(const u16*)block) * ((const i8*)block)[2 + i % 32];
        }
        default: {  // Q4_0
            const char* block = row + 18 * (i / 32);
            int byte = ((const u8*)block)[2 + i % 16];
            return float_of_half(*(const u16*)block) * ((i % 32 < 16 ? byte & 15 : byte >> 4) - 8);
        }
    }
}

// Source: Press et al., ALiBi, as ggml computes it for head counts that are no power of 2.
DEVICE float slope_of(const RowAttend& a, i64 head) {
    if (a.max_bias == 0.0f) return 1.0f;
    float n = (float)a.n_slopes, h = (float)head;
    return exp2f(-a.max_bias * (h < n ? (h + 1) / n : (2 * (h - n) + 1) / (2 * n)));
}

KERNEL(128) attend(RowAttend a) {
    begin();
    __shared__ float q[MAX_ROW], o[MAX_ROW], scores[CELLS], weights[CELLS];
    i64 token = blockIdx.x % a.n_tokens, seq = blockIdx.x / a.n_tokens, head = blockIdx.y;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Seen seen = {0, a.n_kv};
    const i32* table = nullptr;
    if (a.pages) {
        i64 n_seen = ((const i32*)a.n_seen)[token], row = a.rows ? ((const i32*)a.rows)[token] : 0;
        if (n_seen < 0 || n_seen > CELLS * a.n_pages || row < 0 || row >= a.n_sequences) {
            if (threadIdx.x == 0) report(a.status, a.node);
            return;
        }
        table = (const i32*)a.pages + row * a.n_pages;
        seen = seen_of(n_seen, a.n_pages, a.window);
    }
    const char* k = (const char*)(a.k + seq / a.seq_group * a.k_seq + head / a.group * a.k_head);
    const char* v = (const char*)(a.v + seq / a.seq_group * a.v_seq + head / a.group * a.v_head);
    const u16* mask = nullptr;
    if (a.mask) {
        i64 at = seq % a.n_mask_seq * a.mask_seq + head % a.n_mask_head * a.mask_head + token * a.mask_row;
        mask = (const u16*)(a.mask + at);
    }
    const float* x = (const float*)(a.q + seq * a.q_seq + head * a.q_head + token * a.q_row);
    for (i64 i = threadIdx.x; i < a.d; i += blockDim.x) q[i] = x[i];
    for (i64 i = threadIdx.x; i < a.d_v; i += blockDim.x) o[i] = 0.0f;
    float peak = -INFINITE, sum = 0.0f, slope = slope_of(a, head);
    for (i64 first = seen.begin / CELLS * CELLS; first < seen.end; first += CELLS) {
        i64 at = first;
        if (table) {
            i64 page = table[first / CELLS];
            if (page < 0 || page >= a.n_pool) {
                if (threadIdx.x == 0) report(a.status, a.node);
                continue;
            }
            at = page * CELLS;
        }
        int low = (int)max(0ll, seen.begin - first), high = (int)min((i64)CELLS, seen.end - first);
        __syncthreads();
        for (int c = warp; c < CELLS; c += WARPS) {
            float score = -INFINITE;
            if (c >= low && c < high) {
                float product = 0.0f;
                const char* row = k + (at + c) * a.k_row;
                for (i64 i = lane; i < a.d; i += WARP) product = fmaf(q[i], element(row, a.k_type, i), product);
                score = capped(warp_sum(product) * a.scale, a.softcap);
                if (mask) score += slope * float_of_half(mask[first + c]);
            }
            if (lane == 0) scores[c] = score * LOG2E;
        }
        __syncthreads();
        float top = fmaxf(peak, warp_max(fmaxf(scores[lane], scores[lane + WARP]))), keep = rescaled(peak, top);
        float low_weight = weight(scores[lane], top), high_weight = weight(scores[lane + WARP], top);
        sum = fmaf(sum, keep, warp_sum(low_weight + high_weight));
        peak = top;
        if (warp == 0) weights[lane] = low_weight, weights[lane + WARP] = high_weight;
        __syncthreads();
        for (i64 i = threadIdx.x; i < a.d_v; i += blockDim.x) {
            float total = o[i] * keep;
            for (int c = low; c < high; c++) {
                if (weights[c] != 0.0f) total = fmaf(weights[c], element(v + (at + c) * a.v_row, a.v_type, i), total);
            }
            o[i] = total;
        }
    }
    float by = finishing(peak, sum, a.sinks ? (const float*)a.sinks + head : nullptr);
    float* y = (float*)(a.y + seq * a.y_seq + token * a.y_row + head * a.y_head);
    for (i64 i = threadIdx.x; i < a.d_v; i += blockDim.x) y[i] = o[i] * by;
}
