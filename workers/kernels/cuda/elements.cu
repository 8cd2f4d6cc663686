// Functions of elements. A thread has one element, or four that lie together (`width`): then ne[0] counts fours, and nb[0] is
// the stride of a four.

// The order of the op table's kinds, then those that have an op of their own (`UNARY` in row_launches).
enum Unary_ {
    ABS, SGN, NEG, STEP, TANH, ELU, RELU, SIGMOID, GELU, GELU_QUICK, SILU, HARDSWISH, HARDSIGMOID, EXP, EXPM1, SOFTPLUS,
    GELU_ERF, XIELU, FLOOR, CEIL, ROUND, TRUNC, SQR, SQRT, LOG, SIN, COS, SCALE, CLAMP, LEAKY_RELU, SAME
};

DEVICE float xielu(float x, float alpha_n, float alpha_p, float beta, float eps) {
    return x > 0.0f ? alpha_p * x * x + beta * x : (expm1f(at_most(x, eps)) - x) * alpha_n + beta * x;
}

#define EACH(expression)              \
    _Pragma("unroll")                 \
    for (int j = 0; j < 4; j++) {     \
        float x = v[j];               \
        v[j] = (expression);          \
    }                                 \
    break

DEVICE void apply(const Unary& a, float (&v)[4]) {
    switch ((int)a.kind) {
        case ABS: EACH(fabsf(x));
        case SGN: EACH(x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x);
        case NEG: EACH(-x);
        case STEP: EACH(x > 0.0f ? 1.0f : 0.0f);
        case TANH: EACH(tanhf(x));
        case ELU: EACH(x > 0.0f ? x : expm1f(x));
        case RELU: EACH(at_least(x, 0.0f));
        case SIGMOID: EACH(sigmoid(x));
        case GELU: EACH(gelu(x));
        case GELU_QUICK: EACH(gelu_quick(x));
        case SILU: EACH(silu(x));
        case HARDSWISH: EACH(x * at_most(at_least((x + 3.0f) / 6.0f, 0.0f), 1.0f));
        case HARDSIGMOID: EACH(at_most(at_least((x + 3.0f) / 6.0f, 0.0f), 1.0f));
        case EXP: EACH(expf(x));
        case EXPM1: EACH(expm1f(x));
        case SOFTPLUS: EACH(x > 20.0f ? x : log1pf(expf(x)));
        case GELU_ERF: EACH(gelu_erf(x));
        case XIELU: EACH(xielu(x, a.p0, a.p1, a.p2, a.p3));
        case FLOOR: EACH(floorf(x));
        case CEIL: EACH(ceilf(x));
        case ROUND: EACH(roundf(x));
        case TRUNC: EACH(truncf(x));
        case SQR: EACH(x * x);
        case SQRT: EACH(sqrtf(x));
        case LOG: EACH(logf(x));
        case SIN: EACH(sinf(x));
        case COS: EACH(cosf(x));
        case SCALE: EACH(fmaf(x, a.p0, a.p1));
        case CLAMP: EACH(at_most(at_least(x, a.p0), a.p1));
        case LEAKY_RELU: EACH(x > 0.0f ? x : x * a.p0);
    }
}

KERNEL(256) unary(Unary a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.ne, at);
    const char* x = (const char*)a.x + offset(at, a.x_nb);
    char* y = (char*)a.y + offset(at, a.y_nb);
    float v[4] = {};
    if (a.width == 4) {
        load_floats(a.x_type, x, v);
        apply(a, v);
        store_floats(a.y_type, y, v);
    } else {
        v[0] = load_float(a.x_type, x);
        apply(a, v);
        store_float(a.y_type, y, v[0]);
    }
}

KERNEL(256) binary(Binary a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.ne, at);
    const char* x = (const char*)a.x + offset(at, a.x_nb);
    char* y = (char*)a.y + offset(at, a.y_nb);
    if (a.wraps)
        for (int d = 0; d < 4; d++) at[d] %= a.z_ne[d];
    const char* z = (const char*)a.z + offset(at, a.z_nb);
    float v[4] = {}, w[4] = {};
    if (a.width == 4) {
        load_floats(a.x_type, x, v);
        if (a.z_nb[0]) load_floats(a.z_type, z, w);
        else w[0] = w[1] = w[2] = w[3] = load_float(a.z_type, z);
        combine((int)a.kind, a.p0, a.p1, v, w);
        store_floats(a.y_type, y, v);
    } else {
        v[0] = load_float(a.x_type, x), w[0] = load_float(a.z_type, z);
        combine((int)a.kind, a.p0, a.p1, v, w);
        store_float(a.y_type, y, v[0]);
    }
}

DEVICE void add_floats(float (&v)[4], const char* x, i64 width, i64 step) {
    float w[4] = {};
    if (width == 4 && step) load_floats(F32, x, w);
    else w[0] = w[1] = w[2] = w[3] = *(const float*)x;
    for (int j = 0; j < 4; j++) v[j] += w[j];
}

// ((x0 + x1) + x2) + ..., float32.
KERNEL(256) add_terms(AddTerms a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.ne, at);
    const char* x = (const char*)a.x + offset(at, a.x_nb);
    char* y = (char*)a.y + offset(at, a.y_nb);
    float v[4];
    if (a.width == 4) load_floats(F32, x, v);
    else v[0] = v[1] = v[2] = v[3] = *(const float*)x;
    for (i64 t = 1; t < a.n_terms; t++) add_floats(v, x + t * a.step, a.width, a.x_nb[0]);
    if (a.z) add_floats(v, (const char*)a.z + offset(at, a.z_nb), a.width, a.z_nb[0]);
    if (a.w) add_floats(v, (const char*)a.w + offset(at, a.w_nb), a.width, a.w_nb[0]);
    if (a.width == 4) store_floats(F32, y, v);
    else *(float*)y = v[0];
}

KERNEL(256) count_up(CountUp a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.ne, at);
    store_float(a.y_type, (char*)a.y + offset(at, a.y_nb), (float)((double)a.start + (double)a.step * (double)i));
}

KERNEL(256) diag_mask(DiagMask a) {
    begin();
    i64 i = thread_index();
    if (i >= a.n) return;
    i64 at[4];
    coordinates(i, a.ne, at);
    float x = *(const float*)((const char*)a.x + offset(at, a.x_nb));
    *(float*)((char*)a.y + offset(at, a.y_nb)) = at[0] > a.n_past + at[1] ? -INFINITE : x;
}
