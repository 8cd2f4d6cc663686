// Elements by strides: where they lie, and numbers of several types as float32.

enum Type { F32 = 0, F16 = 1, I8 = 24, I16 = 25, I32 = 26, I64 = 27, BF16 = 30 };  // ggml's numbers

DEVICE i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// The coordinates of element i, counted in ggml's order.
DEVICE void coordinates(i64 i, const i64 (&ne)[4], i64 (&at)[4]) {
    at[0] = i, at[1] = at[2] = at[3] = 0;
    if (i < ne[0]) return;
    i64 rows = ne[1] * ne[2] * ne[3];
    if (ne[0] <= 0xffffffffu && rows <= 0xffffffffu && i <= 0xffffffffu) {  // divisions of 32 bits are several times faster
        u32 row = (u32)i / (u32)ne[0], plane = row / (u32)ne[1];
        at[0] = (u32)i - row * (u32)ne[0];
        at[1] = row - plane * (u32)ne[1];
        at[3] = plane / (u32)ne[2];
        at[2] = plane - (u32)at[3] * (u32)ne[2];
        return;
    }
    i64 row = i / ne[0], plane = row / ne[1];
    at[0] = i - row * ne[0];
    at[1] = row - plane * ne[1];
    at[3] = plane / ne[2];
    at[2] = plane - at[3] * ne[2];
}

DEVICE i64 offset(const i64 (&at)[4], const i64 (&nb)[4]) {
    return at[0] * nb[0] + at[1] * nb[1] + at[2] * nb[2] + at[3] * nb[3];
}

// Where row r of a tensor with rows ne[1], ne[2], ne[3] begins.
DEVICE i64 row_offset(u32 r, const i64 (&ne)[4], const i64 (&nb)[4]) {
    if (r < ne[1]) return r * nb[1];
    u32 plane = r / (u32)ne[1], cube = plane / (u32)ne[2];
    return (r - plane * (u32)ne[1]) * nb[1] + (plane - cube * (u32)ne[2]) * nb[2] + cube * nb[3];
}

DEVICE i64 load_id(i64 id_bytes, const char* at) { return id_bytes == 4 ? *(const i32*)at : *(const i64*)at; }

DEVICE float load_float(i64 type, const char* at) {
    if (type == F32) return *(const float*)at;
    if (type == F16) return float_of_half(*(const u16*)at);
    return float_of_bf16(*(const u16*)at);
}

DEVICE void store_float(i64 type, char* at, float x) {
    if (type == F32) *(float*)at = x;
    else if (type == F16) *(u16*)at = half_of(x);
    else *(u16*)at = bf16_of(x);
}

// Four that lie together, at a multiple of their size.
DEVICE void load_floats(i64 type, const char* at, float (&x)[4]) {
    if (type == F32) {
        float4 v = *(const float4*)at;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        return;
    }
    uint2 v = *(const uint2*)at;
    u16 part[4] = {(u16)v.x, (u16)(v.x >> 16), (u16)v.y, (u16)(v.y >> 16)};
    for (int j = 0; j < 4; j++) x[j] = type == F16 ? float_of_half(part[j]) : float_of_bf16(part[j]);
}

DEVICE void store_floats(i64 type, char* at, const float (&x)[4]) {
    if (type == F32) *(float4*)at = make_float4(x[0], x[1], x[2], x[3]);
    else if (type == F16) *(uint2*)at = make_uint2(halves_of(x[0], x[1]), halves_of(x[2], x[3]));
    else *(uint2*)at = make_uint2(pair(bf16_of(x[0]), bf16_of(x[1])), pair(bf16_of(x[2]), bf16_of(x[3])));
}

// Rows of up to N fours a thread stay in registers: all loads are on their way at once.
template <int N>
DEVICE void load_row(const char* row, int n, float (&v)[N][4]) {
    for (int k = 0; k < N; k++) {
        int i = 4 * (threadIdx.x + k * blockDim.x);
        if (i < n) load_floats(F32, row + 4 * i, v[k]);
        else v[k][0] = v[k][1] = v[k][2] = v[k][3] = 0.0f;
    }
}

template <int N>
DEVICE void store_row(char* row, int n, const float (&v)[N][4]) {
    for (int k = 0; k < N; k++) {
        int i = 4 * (threadIdx.x + k * blockDim.x);
        if (i < n) store_floats(F32, row + 4 * i, v[k]);
    }
}
