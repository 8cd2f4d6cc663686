// Convolutions and recurrences over tokens. The sums of a token run in an order of their own, and a state is float32 between
// tokens, so neither where a text is cut nor what else is in a batch changes a bit.
// Source: Dao and Gu 2024 (Mamba-2).

#define MAX_CONV 16

// Tokens lie together in x, channels in y: a tile of x goes through shared memory.
KERNEL(256) ssm_conv(SsmConv a) {
    begin();
    __shared__ float x[32][32 + MAX_CONV];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, d_conv = (int)a.d_conv;
    i64 n_tiles = (a.n_channels + 31) / 32, seq = blockIdx.y;
    i64 channel = blockIdx.x % n_tiles * 32, token = blockIdx.x / n_tiles * 32;
    int n_channels = a.n_channels - channel < 32 ? (int)(a.n_channels - channel) : 32;
    int n_tokens = a.n_tokens - token < 32 ? (int)(a.n_tokens - token) : 32;
    const char* from = (const char*)a.x + seq * a.x_nb[2] + channel * a.x_nb[1] + token * a.x_nb[0];
    int width = n_tokens + d_conv - 1;
    for (int i = threadIdx.x; i < n_channels * width; i += blockDim.x)
        x[i / width][i % width] = *(const float*)(from + i / width * a.x_nb[1] + i % width * a.x_nb[0]);
    __syncthreads();
    if (lane >= n_channels) return;
    float w[MAX_CONV];
    for (int k = 0; k < MAX_CONV; k++)
        w[k] = k < d_conv ? *(const float*)((const char*)a.w + (channel + lane) * a.w_nb[1] + k * a.w_nb[0]) : 0.0f;
    float bias = a.bias ? *(const float*)((const char*)a.bias + (channel + lane) * a.bias_step) : 0.0f;
    for (int t = warp; t < n_tokens; t += 8) {
        float sum = 0.0f;
        for (int k = 0; k < MAX_CONV; k++)
            if (k < d_conv) sum += x[lane][t + k] * w[k];
        if (a.bias) sum += bias;
        if (a.silu) sum = sum / (1.0f + expf(-sum));
        *(float*)((char*)a.y + (channel + lane) * a.y_nb[0] + (token + t) * a.y_nb[1] + seq * a.y_nb[2]) = sum;
    }
}

// Compiled with EACH, the numbers of a row's state that one of its LANES has: j = lane + LANES * i.
#ifdef EACH
#define LANES 8
#define ROWS (256 / LANES)
#define STATE (LANES * EACH)
#define TOKENS (STATE <= 128 ? 16 : 4)

KERNEL(256) ssm_scan(SsmScan a) {
    begin();
    __shared__ float b[TOKENS][STATE], c[TOKENS][STATE], steps[TOKENS];
    int lane = threadIdx.x % LANES;
    i64 n_tiles = (a.d_head + ROWS - 1) / ROWS, unit = blockIdx.x / n_tiles, row = blockIdx.x % n_tiles * ROWS + threadIdx.x / LANES;
    i64 seq = unit / a.n_head, head = unit % a.n_head, slot = ((const i32*)a.ids)[seq];
    if (slot < 0 || slot >= a.n_slots) {
        if (threadIdx.x == 0) report(a.status, a.node);
        return;
    }
    bool mine = row < a.d_head;
    i64 d_state = a.d_state, n_rows = a.n_seqs * a.n_head * a.d_head;
    i64 number = (seq * a.n_head + head) * a.d_head + row;
    float* y = (float*)a.y;
    float* states = y + n_rows * a.n_tokens;
    float h[EACH], decay[EACH];
    for (int i = 0; i < EACH; i++) {
        i64 j = lane + LANES * i;
        bool in = mine && j < d_state;
        h[i] = in ? ((const float*)a.state)[((slot * a.n_head + head) * a.d_head + row) * d_state + j] : 0.0f;
        decay[i] = in ? ((const float*)a.a)[head * a.n_a + (a.n_a == 1 ? 0 : j)] : 0.0f;
    }
    i64 group = head / a.each;
    const char* x = (const char*)a.x + row * a.x_nb[0] + head * a.x_nb[1] + seq * a.x_nb[3];
    const char *to = (const char*)a.b + group * a.b_nb[1] + seq * a.b_nb[3], *out = (const char*)a.c + group * a.c_nb[1] + seq * a.c_nb[3];
    for (i64 first = 0; first < a.n_tokens; first += TOKENS) {
        int n = a.n_tokens - first < TOKENS ? (int)(a.n_tokens - first) : TOKENS;
        __syncthreads();
        for (int i = threadIdx.x; i < n * STATE; i += blockDim.x) {
            int t = i / STATE, j = i % STATE;
            b[t][j] = j < d_state ? *(const float*)(to + j * a.b_nb[0] + (first + t) * a.b_nb[2]) : 0.0f;
            c[t][j] = j < d_state ? *(const float*)(out + j * a.c_nb[0] + (first + t) * a.c_nb[2]) : 0.0f;
        }
        if (threadIdx.x < n) {
            float raw = ((const float*)a.dt)[(seq * a.n_tokens + first + threadIdx.x) * a.n_head + head];
            steps[threadIdx.x] = raw > 20.0f ? raw : log1pf(expf(raw));
        }
        __syncthreads();
        for (int t = 0; t < n; t++) {
            float d = steps[t], dx = mine ? d * *(const float*)(x + (first + t) * a.x_nb[2]) : 0.0f, sum = 0.0f;
            float whole = expf(d * decay[0]);
            for (int i = 0; i < EACH; i++) {
                float kept = a.n_a == 1 ? whole : expf(d * decay[i]);
                h[i] = fmaf(kept, h[i], dx * b[t][lane + LANES * i]);
                sum = fmaf(h[i], c[t][lane + LANES * i], sum);
            }
            for (int step = LANES / 2; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (mine && lane == 0) y[((seq * a.n_tokens + first + t) * a.n_head + head) * a.d_head + row] = sum;
            i64 later = a.n_tokens - 1 - first - t;
            if (mine && later < a.n_states)
                for (int i = 0; i < EACH; i++)
                    if (lane + LANES * i < d_state) states[(later * n_rows + number) * d_state + lane + LANES * i] = h[i];
        }
    }
    for (i64 s = a.n_tokens; mine && s < a.n_states; s++)
        for (int i = 0; i < EACH; i++)
            if (lane + LANES * i < d_state) states[(s * n_rows + number) * d_state + lane + LANES * i] = 0.0f;
}
#endif
