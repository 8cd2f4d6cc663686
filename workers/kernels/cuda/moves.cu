// Copies, conversions, rows by index.

DEVICE void move(i64 unit, const char* x, char* y) {
    switch ((int)unit) {
        case 1: *y = *x; break;
        case 2: *(u16*)y = *(const u16*)x; break;
        case 4: *(u32*)y = *(const u32*)x; break;
        case 8: *(u64*)y = *(const u64*)x; break;
        case 16: *(uint4*)y = *(const uint4*)x; break;
    }
}

DEVICE bool is_float(i64 type) { return type == F32 || type == F16 || type == BF16; }

DEVICE i64 load_integer(i64 type, const char* at) {
    if (type == I8) return *(const i8*)at;
    if (type == I16) return *(const short*)at;
    return type == I32 ? *(const i32*)at : *(const i64*)at;
}

DEVICE void store_integer(i64 type, char* at, i64 x) {
    if (type == I8) *(i8*)at = (i8)x;
    else if (type == I16) *(short*)at = (short)x;
    else if (type == I32) *(i32*)at = (i32)x;
    else *(i64*)at = x;
}

DEVICE void convert(i64 x_type, const char* x, i64 y_type, char* y) {
    if (is_float(x_type)) {
        float v = load_float(x_type, x);
        if (is_float(y_type)) store_float(y_type, y, v);
        else store_integer(y_type, y, (i64)v);
    } else {
        i64 v = load_integer(x_type, x);
        if (is_float(y_type)) store_float(y_type, y, (float)v);
        else store_integer(y_type, y, v);
    }
}

KERNEL(256) copy(Copy a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.x_ne, at);
    const char* x = (const char*)a.x + offset(at, a.x_nb);
    coordinates(i, a.y_ne, at);
    char* y = (char*)a.y + offset(at, a.y_nb);
    if (a.unit) move(a.unit, x, y);
    else convert(a.x_type, x, a.y_type, y);
}

// Tiles of 32 x 32 through shared memory, so that neighbours are read and written together: 32 x 8 threads.
KERNEL(256) transpose(Transpose a) {
    begin();
    __shared__ u64 tile[32][33];
    u32 columns = (u32)((a.ne[0] + 31) / 32), plane = blockIdx.y;
    i64 i0 = (i64)(blockIdx.x % columns) * 32, j0 = (i64)(blockIdx.x / columns) * 32;
    i64 i2 = plane % (u32)a.ne[2], i3 = plane / (u32)a.ne[2];
    const char* x = (const char*)a.x + i2 * a.x_nb[2] + i3 * a.x_nb[3];
    char* y = (char*)a.y + i2 * a.y_nb[2] + i3 * a.y_nb[3];
    int lane = threadIdx.x % 32;
    for (int k = threadIdx.x / 32; k < 32; k += 8) {
        i64 i = i0 + k, j = j0 + lane;
        if (i < a.ne[0] && j < a.ne[1]) move(a.unit, x + i * a.x_nb[0] + j * a.x_nb[1], (char*)&tile[k][lane]);
    }
    __syncthreads();
    for (int k = threadIdx.x / 32; k < 32; k += 8) {
        i64 i = i0 + lane, j = j0 + k;
        if (i < a.ne[0] && j < a.ne[1]) move(a.unit, (const char*)&tile[lane][k], y + i * a.y_nb[0] + j * a.y_nb[1]);
    }
}

KERNEL(256) repeat(Repeat a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.ne, at);
    char* y = (char*)a.y + offset(at, a.y_nb);
    for (int d = 0; d < 4; d++) at[d] %= a.x_ne[d];
    move(a.unit, (const char*)a.x + offset(at, a.x_nb), y);
}

// -- rows by index --------------------------------------------------------------------------------------------------

DEVICE void move_floats(i64 width, i64 x_type, const char* x, i64 y_type, char* y) {
    if (width == 4) {
        float v[4];
        load_floats(x_type, x, v);
        store_floats(y_type, y, v);
    } else {
        store_float(y_type, y, load_float(x_type, x));
    }
}

// y[:, r, i, j] = x[:, ids[r, i, j], i, j]
KERNEL(256) get_rows(GetRows a) {
    begin();
    i64 t = thread_index();
    if (t >= a.n) return;
    i64 at[4];
    coordinates(t, a.ne, at);
    i64 id = load_id(a.id_bytes, (const char*)a.ids + at[1] * a.ids_nb[0] + at[2] * a.ids_nb[1] + at[3] * a.ids_nb[2]);
    if (id < 0 || id >= a.n_all) return report(a.status, a.node);
    char* y = (char*)a.y + offset(at, a.y_nb);
    const char* x = (const char*)a.x + at[0] * a.x_nb[0] + id * a.x_nb[1] + at[2] * a.x_nb[2] + at[3] * a.x_nb[3];
    if (a.x_type == I32) *(i32*)y = *(const i32*)x;
    else move_floats(a.width, a.x_type, x, a.y_type, y);
}

// Where the row that coordinates name goes to; -1: nowhere.
template <class A>
DEVICE i64 target(const A& a, const i64 (&at)[4]) {
    i64 second = at[2] % a.ids_ne[1] * a.ids_nb[1], third = at[3] % a.ids_ne[2] * a.ids_nb[2];
    i64 id = load_id(a.id_bytes, (const char*)a.ids + at[1] * a.ids_nb[0] + second + third);
    return id < 0 || id >= a.n_all ? -1 : at[0] * a.y_nb[0] + id * a.y_nb[1] + at[2] * a.y_nb[2] + at[3] * a.y_nb[3];
}

KERNEL(256) set_rows(SetRows a) {
    begin();
    i64 t = thread_index();
    if (t >= a.n) return;
    i64 at[4];
    coordinates(t, a.ne, at);
    i64 to = target(a, at);
    if (to < 0) return report(a.status, a.node);
    const char* x = (const char*)(blockIdx.y ? a.x_too : a.x);
    char* y = (char*)(blockIdx.y ? a.y_too : a.y);
    move_floats(a.width, a.x_type, x + offset(at, a.x_nb), a.y_type, y + to);
}

// A warp's 32 elements as a block: a float16 scale and 32 int8.
DEVICE void store_q8(float x, char* block) {
    float d = warp_max(fabsf(x)) / 127.0f;
    int lane = threadIdx.x % WARP;
    if (lane == 0) *(u16*)block = half_of(d);
    float inverse = d != 0.0f ? 1.0f / d : 0.0f;
    block[2 + lane] = (char)(i8)__float2int_rn(x * inverse);
}

KERNEL(256) set_rows_q8(SetRowsQ8 a) {
    begin();
    i64 b = thread_index() / WARP, lane = threadIdx.x % WARP;
    if (b >= a.n) return;
    i64 at[4];
    coordinates(b, a.ne, at);
    i64 to = target(a, at);
    if (to < 0) {
        if (lane == 0) report(a.status, a.node);
        return;
    }
    at[0] = at[0] * 32 + lane;
    const char* x = (const char*)(blockIdx.y ? a.x_too : a.x);
    char* y = (char*)(blockIdx.y ? a.y_too : a.y);
    store_q8(load_float(a.x_type, x + offset(at, a.x_nb)), y + to);
}

KERNEL(256) copy_q8(CopyQ8 a) {
    begin();
    i64 b = thread_index() / WARP;
    if (b >= a.n) return;
    i64 at[4], of_block[4];
    coordinates(b, a.y_ne, of_block);
    coordinates(b * 32 + threadIdx.x % WARP, a.x_ne, at);
    store_q8(load_float(a.x_type, (const char*)a.x + offset(at, a.x_nb)), (char*)a.y + offset(of_block, a.y_nb));
}
