// What `primitives.cuh` gives kernels, for a host's compiler.
// Source: the PTX ISA (cvt, fma.f16x2, mma.sync.m16n8k16, ldmatrix).

// -- numbers of 16 bits ---------------------------------------------------------------------------------------------

static float float_of_half(u16 h) {
    u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)fraction * 0x1p-24f));
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

// To the nearest, of two the even one; what is no number is 0x7fff.
static u16 emulated_half(double x) {
    if (x != x) return 0x7fff;
    u64 bits = emulated_bits<u64>(x);
    u16 sign = (u16)(bits >> 48 & 0x8000);
    int exponent = (int)(bits >> 52 & 2047) - 1023;
    if (exponent > 15) return sign | 0x7c00;
    if (exponent < -25) return sign;
    u64 mantissa = (bits & 0xfffffffffffffull) | 1ull << 52;
    int drop = exponent >= -14 ? 42 : 42 + (-14 - exponent);
    u64 kept = mantissa >> drop, rest = mantissa & ((1ull << drop) - 1), half = 1ull << (drop - 1);
    if (rest > half || (rest == half && (kept & 1))) kept++;
    // The hidden bit, and a carry, add one to the exponent.
    return (u16)(sign | (exponent >= -14 ? kept + ((u64)(exponent + 14) << 10) : kept));
}

DEVICE u16 half_of(float f) { return emulated_half(f); }
DEVICE float float_of_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u16 bf16_of(float f) {
    u32 bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 64);
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
DEVICE u32 pair(u16 low, u16 high) { return (u32)low | (u32)high << 16; }
DEVICE u32 halves_of(float low, float high) { return pair(half_of(low), half_of(high)); }
DEVICE u32 sub_halves(u32 a, u32 b) {
    return pair(emulated_half((double)float_of_half((u16)a) - float_of_half((u16)b)),
                emulated_half((double)float_of_half((u16)(a >> 16)) - float_of_half((u16)(b >> 16))));
}
DEVICE u32 mul_halves(u32 a, u32 b) {
    return pair(emulated_half((double)float_of_half((u16)a) * float_of_half((u16)b)),
                emulated_half((double)float_of_half((u16)(a >> 16)) * float_of_half((u16)(b >> 16))));
}
// The product is exact; the sum is rounded to an odd number where it is not, so that the second rounding is the only one.
static u16 emulated_fma(u16 a, u16 b, u16 c) {
    double p = (double)float_of_half(a) * float_of_half(b), q = float_of_half(c), s = p + q;
    double back = s - p, error = (p - (s - back)) + (q - back);
    u64 bits = emulated_bits<u64>(s);
    if (error != 0 && error == error && !(bits & 1)) s = emulated_bits<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
    return emulated_half(s);
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    return pair(emulated_fma((u16)a, (u16)b, (u16)c), emulated_fma((u16)(a >> 16), (u16)(b >> 16), (u16)(c >> 16)));
}
DEVICE u32 low_half_twice(u32 v) { return pair((u16)v, (u16)v); }
DEVICE u32 high_half_twice(u32 v) { return pair((u16)(v >> 16), (u16)(v >> 16)); }
DEVICE u32 choose_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }
template <class T>
DEVICE T held(T x) { return x; }
DEVICE u32 keep_bits(u32 x, u32 mask, u32 y) { return (x & mask) | y; }
DEVICE uint4 stream16(const void* at) { return *(const uint4*)at; }
DEVICE void prefetch(const void*) {}

// -- one kernel after the other, each when all before it is done ------------------------------------------------------

DEVICE void next_may_come() {}
DEVICE void previous_done() {}
DEVICE void begin() {}

// -- copies to shared memory, done as late as they may be -------------------------------------------------------------

struct EmulatedFetch {
    char* to;
    const char* at;
    int lot;
};
struct EmulatedFetches {
    uint3 block;
    int n, first, lot;
    EmulatedFetch of[256];
};
static EmulatedFetches emulated_fetches[1024];
DEVICE EmulatedFetches& emulated_my_fetches() {
    EmulatedFetches& f = emulated_fetches[emulated_now->index.x];
    if (!__builtin_memcmp(&f.block, &emulated_block, sizeof f.block)) return f;
    f.block = emulated_block, f.n = f.first = f.lot = 0;
    return f;
}
static void emulated_fetch(void* to, const void* at, const char* file, int line) {
    EmulatedFetches& f = emulated_my_fetches();
    if ((u64)to % 16 || (u64)at % 16) emulated_fail("a copy to shared memory of addresses that are no multiples of 16", file, line);
    if ((const char*)to < __start_emulated_shared || (const char*)to + 16 > __stop_emulated_shared)
        emulated_fail("a copy to what is not shared memory", file, line);
    if (f.n == 256) {
        __builtin_memmove(f.of, f.of + f.first, (f.n - f.first) * sizeof f.of[0]);
        f.n -= f.first, f.first = 0;
    }
    if (f.n == 256) emulated_fail("more than 256 copies to shared memory on their way", file, line);
    f.of[f.n++] = {(char*)to, (const char*)at, f.lot};
}
DEVICE void fetch16(void* to, const void* at, EMULATED_PLACE) { emulated_fetch(to, at, file, line); }
DEVICE void fetch16_or_zeros(void* to, const void* at, bool is, EMULATED_PLACE) {
    emulated_fetch(to, is ? at : nullptr, file, line);
}
DEVICE void end_of_lot() { emulated_my_fetches().lot++; }
template <int N>
DEVICE void fetched() {
    EmulatedFetches& f = emulated_my_fetches();
    for (; f.first < f.n && f.of[f.first].lot < f.lot - N; f.first++) {
        const EmulatedFetch& one = f.of[f.first];
        if (one.at) __builtin_memcpy(one.to, one.at, 16);
        else __builtin_memset(one.to, 0, 16);
    }
}

// -- matrices -------------------------------------------------------------------------------------------------------

struct EmulatedMatrices {
    u32 a[4], b[2];
    float* d;
};
// Products are exact, and added as float32 in the order of k.
template <class Widen>
static inline void emulated_multiply(void** brought, Widen wide) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; i++) {
        const EmulatedMatrices* m = (const EmulatedMatrices*)brought[i];
        int g = i / 4, t = i % 4;
        for (int half = 0; half < 2; half++) {
            for (int k = 0; k < 2; k++) {
                a[g][8 * k + 2 * t + half] = wide((u16)(m->a[2 * k] >> 16 * half));
                a[g + 8][8 * k + 2 * t + half] = wide((u16)(m->a[2 * k + 1] >> 16 * half));
                b[8 * k + 2 * t + half][g] = wide((u16)(m->b[k] >> 16 * half));
            }
        }
    }
    for (int i = 0; i < 32; i++) {
        float* d = ((EmulatedMatrices*)brought[i])->d;
        for (int j = 0; j < 4; j++) {
            int row = i / 4 + j / 2 * 8, column = 2 * (i % 4) + j % 2;
            float sum = d[j];
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            d[j] = sum;
        }
    }
}
static void emulated_mma_halves(void** brought, int) { emulated_multiply(brought, float_of_half); }
static void emulated_mma_bf16s(void** brought, int) { emulated_multiply(brought, [](u16 h) { return float_of_bf16(h); }); }
DEVICE void mma_halves(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, EMULATED_PLACE) {
    EmulatedMatrices m = {{a0, a1, a2, a3}, {b0, b1}, d};
    emulated_meet_warp(0xffffffffu, &m, emulated_mma_halves, "mma_halves", file, line);
}
DEVICE void mma_bf16s(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, EMULATED_PLACE) {
    EmulatedMatrices m = {{a0, a1, a2, a3}, {b0, b1}, d};
    emulated_meet_warp(0xffffffffu, &m, emulated_mma_bf16s, "mma_bf16s", file, line);
}

struct EmulatedRows {
    u16 row[8];
    u32* v;
};
static void emulated_transpose(void** brought, int) {
    EMULATED_LANES(i) {
        for (int m = 0; m < 4; m++) {
            const EmulatedRows *low = (EmulatedRows*)brought[8 * m + 2 * (i % 4)], *high = (EmulatedRows*)brought[8 * m + 2 * (i % 4) + 1];
            ((EmulatedRows*)brought[i])->v[m] = pair(low->row[i / 4], high->row[i / 4]);
        }
    }
}
DEVICE void load_transposed(u32 (&v)[4], const void* row, EMULATED_PLACE) {
    EmulatedRows r = {{}, v};
    if ((u64)row % 16) emulated_fail("load_transposed of an address that is no multiple of 16", file, line);
    if ((const char*)row < __start_emulated_shared || (const char*)row + 16 > __stop_emulated_shared)
        emulated_fail("load_transposed of what is not shared memory", file, line);
    __builtin_memcpy(r.row, row, 16);
    emulated_meet_warp(0xffffffffu, &r, emulated_transpose, "load_transposed", file, line);
}
