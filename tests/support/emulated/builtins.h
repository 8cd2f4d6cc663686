// What CUDA itself gives kernels, for a host's compiler: the same names, with the meaning that they have on a device. A thread is a
// fiber of `machine.cpp`; where threads meet, a fiber waits there for the others.
// Source: the CUDA C++ programming guide.

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef decltype(sizeof 0) size_t;

#define INFINITE __builtin_inff()
#define DEVICE static inline __attribute__((always_inline))
#define KERNEL(...) extern "C" void
#define ROOM(name, bytes) __shared__ __align__(128) u8 name[bytes]
#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __forceinline__ static inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define __grid_constant__

// -- vectors --------------------------------------------------------------------------------------------------------

#define VECTORS(T, name, align2, align4)                                                                                  \
    struct alignas(align2) name##2 { T x, y; };                                                                           \
    struct name##3 { T x, y, z; };                                                                                        \
    struct alignas(align4) name##4 { T x, y, z, w; };                                                                     \
    DEVICE name##2 make_##name##2(T x, T y) { return {x, y}; }                                                            \
    DEVICE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                                    \
    DEVICE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(signed char, char, 2, 4)
VECTORS(unsigned char, uchar, 2, 4)
VECTORS(short, short, 4, 8)
VECTORS(unsigned short, ushort, 4, 8)
VECTORS(int, int, 8, 16)
VECTORS(unsigned int, uint, 8, 16)
VECTORS(float, float, 8, 16)
VECTORS(long long, longlong, 16, 16)
VECTORS(unsigned long long, ulonglong, 16, 16)
VECTORS(double, double, 16, 16)
#undef VECTORS
typedef uint3 dim3;

// -- the machine ----------------------------------------------------------------------------------------------------

struct EmulatedThread {
    uint3 index;
    int lane;
};
// Called when all have come, with what each brought; null where a lane does not take part.
typedef void (*EmulatedExchange)(void** brought, int n);
extern "C" {
extern EmulatedThread* emulated_now;
extern uint3 emulated_block, emulated_block_size, emulated_grid_size;
void emulated_meet_warp(u32 mask, void* brought, EmulatedExchange exchange, const char* what, const char* file, int line);
void emulated_meet_block(void* brought, EmulatedExchange exchange, const char* what, const char* file, int line);
void emulated_fail(const char* what, const char* file, int line);
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
}
#define threadIdx (emulated_now->index)
#define blockIdx (*(const uint3*)&emulated_block)
#define blockDim (*(const uint3*)&emulated_block_size)
#define gridDim (*(const uint3*)&emulated_grid_size)
#define warpSize 32
#define EMULATED_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATED_LANES(i) for (int i = 0; i < 32; i++) if (brought[i])

DEVICE void __syncthreads(EMULATED_PLACE) { emulated_meet_block(nullptr, nullptr, "__syncthreads", file, line); }
DEVICE void __syncwarp(u32 mask = 0xffffffffu, EMULATED_PLACE) {
    emulated_meet_warp(mask, nullptr, nullptr, "__syncwarp", file, line);
}
DEVICE void __threadfence() {}
DEVICE void __threadfence_block() {}

struct EmulatedCount {
    int in, n, all, any;
};
static void emulated_count(void** brought, int n) {
    int count = 0, all = 1;
    for (int i = 0; i < n; i++) {
        int in = ((EmulatedCount*)brought[i])->in != 0;
        count += in, all &= in;
    }
    for (int i = 0; i < n; i++) {
        EmulatedCount* c = (EmulatedCount*)brought[i];
        c->n = count, c->all = all, c->any = count > 0;
    }
}
DEVICE int __syncthreads_count(int in, EMULATED_PLACE) {
    EmulatedCount c = {in};
    emulated_meet_block(&c, emulated_count, "__syncthreads_count", file, line);
    return c.n;
}
DEVICE int __syncthreads_and(int in, EMULATED_PLACE) {
    EmulatedCount c = {in};
    emulated_meet_block(&c, emulated_count, "__syncthreads_and", file, line);
    return c.all;
}
DEVICE int __syncthreads_or(int in, EMULATED_PLACE) {
    EmulatedCount c = {in};
    emulated_meet_block(&c, emulated_count, "__syncthreads_or", file, line);
    return c.any;
}

// -- a warp's lanes -------------------------------------------------------------------------------------------------

struct EmulatedShuffle {
    u64 in, out;
    int from;
    bool good;
};
static void emulated_shuffle(void** brought, int) {
    EMULATED_LANES(i) {
        EmulatedShuffle *s = (EmulatedShuffle*)brought[i], *other = (EmulatedShuffle*)brought[s->from];
        s->good = other != nullptr;
        if (other) s->out = other->in;
    }
}
template <class T>
DEVICE T emulated_from(u32 mask, T x, int from, const char* what, const char* file, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle is of 4 or 8 bytes");
    EmulatedShuffle s = {0, 0, from, true};
    __builtin_memcpy(&s.in, &x, sizeof x);
    emulated_meet_warp(mask, &s, emulated_shuffle, what, file, line);
    if (!s.good) emulated_fail("a shuffle from a lane that does not take part in it", file, line);
    __builtin_memcpy(&x, &s.out, sizeof x);
    return x;
}
template <class T>
DEVICE T __shfl_sync(u32 mask, T x, int from, int width = 32, EMULATED_PLACE) {
    int lane = emulated_now->lane;
    return emulated_from(mask, x, (lane & -width) | (from & (width - 1)), "__shfl_sync", file, line);
}
template <class T>
DEVICE T __shfl_xor_sync(u32 mask, T x, int other, int width = 32, EMULATED_PLACE) {
    int lane = emulated_now->lane, from = lane ^ other;
    return emulated_from(mask, x, from >= (lane & -width) + width ? lane : from, "__shfl_xor_sync", file, line);
}
template <class T>
DEVICE T __shfl_up_sync(u32 mask, T x, u32 by, int width = 32, EMULATED_PLACE) {
    int lane = emulated_now->lane, from = lane - (int)by;
    return emulated_from(mask, x, from < (lane & -width) ? lane : from, "__shfl_up_sync", file, line);
}
template <class T>
DEVICE T __shfl_down_sync(u32 mask, T x, u32 by, int width = 32, EMULATED_PLACE) {
    int lane = emulated_now->lane, from = lane + (int)by;
    return emulated_from(mask, x, from >= (lane & -width) + width ? lane : from, "__shfl_down_sync", file, line);
}

struct EmulatedBallot {
    int in;
    u32 out;
};
static void emulated_ballot(void** brought, int) {
    u32 bits = 0;
    EMULATED_LANES(i) if (((EmulatedBallot*)brought[i])->in) bits |= 1u << i;
    EMULATED_LANES(i) ((EmulatedBallot*)brought[i])->out = bits;
}
DEVICE u32 __ballot_sync(u32 mask, int in, EMULATED_PLACE) {
    EmulatedBallot b = {in, 0};
    emulated_meet_warp(mask, &b, emulated_ballot, "__ballot_sync", file, line);
    return b.out;
}
DEVICE int __any_sync(u32 mask, int in, EMULATED_PLACE) { return __ballot_sync(mask, in, file, line) != 0; }
DEVICE int __all_sync(u32 mask, int in, EMULATED_PLACE) { return __ballot_sync(mask, !in, file, line) == 0; }

struct EmulatedMatch {
    u64 in;
    u32 out;
};
static void emulated_match(void** brought, int) {
    EMULATED_LANES(i) {
        EmulatedMatch* m = (EmulatedMatch*)brought[i];
        EMULATED_LANES(j) if (((EmulatedMatch*)brought[j])->in == m->in) m->out |= 1u << j;
    }
}
template <class T>
DEVICE u32 __match_any_sync(u32 mask, T x, EMULATED_PLACE) {
    EmulatedMatch m = {0, 0};
    __builtin_memcpy(&m.in, &x, sizeof x);
    emulated_meet_warp(mask, &m, emulated_match, "__match_any_sync", file, line);
    return m.out;
}

#define REDUCTION(name, T, expression)                                                                                    \
    struct Emulated_##name { T x; };                                                                                      \
    static void emulated_##name(void** brought, int) {                                                                    \
        T a = 0;                                                                                                          \
        bool first = true;                                                                                                \
        EMULATED_LANES(i) {                                                                                               \
            T b = ((Emulated_##name*)brought[i])->x;                                                                      \
            a = first ? b : (expression), first = false;                                                                  \
        }                                                                                                                 \
        EMULATED_LANES(i) ((Emulated_##name*)brought[i])->x = a;                                                          \
    }                                                                                                                     \
    DEVICE T name(u32 mask, T x, EMULATED_PLACE) {                                                                        \
        Emulated_##name r = {x};                                                                                          \
        emulated_meet_warp(mask, &r, emulated_##name, #name, file, line);                                                 \
        return r.x;                                                                                                       \
    }
REDUCTION(__reduce_add_sync, u32, a + b)
REDUCTION(__reduce_min_sync, u32, a < b ? a : b)
REDUCTION(__reduce_max_sync, u32, a > b ? a : b)
REDUCTION(__reduce_and_sync, u32, a & b)
REDUCTION(__reduce_or_sync, u32, a | b)
#undef REDUCTION

// -- atomics: one thread runs at a time -----------------------------------------------------------------------------

#define ATOMIC(name, expression)                                                                                          \
    template <class T>                                                                                                    \
    DEVICE T name(T* at, decltype(T()) x) {                                                                               \
        T old = *at;                                                                                                      \
        *at = (T)(expression);                                                                                            \
        return old;                                                                                                       \
    }
ATOMIC(atomicAdd, old + x)
ATOMIC(atomicSub, old - x)
ATOMIC(atomicMin, old < x ? old : x)
ATOMIC(atomicMax, old > x ? old : x)
ATOMIC(atomicAnd, old & x)
ATOMIC(atomicOr, old | x)
ATOMIC(atomicXor, old ^ x)
ATOMIC(atomicExch, x)
#undef ATOMIC
template <class T>
DEVICE T atomicCAS(T* at, decltype(T()) expected, decltype(T()) x) {
    T old = *at;
    if (old == expected) *at = x;
    return old;
}

// -- bits -----------------------------------------------------------------------------------------------------------

template <class To, class From>
DEVICE To emulated_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE u32 __float_as_uint(float x) { return emulated_bits<u32>(x); }
DEVICE int __float_as_int(float x) { return emulated_bits<int>(x); }
DEVICE float __uint_as_float(u32 x) { return emulated_bits<float>(x); }
DEVICE float __int_as_float(int x) { return emulated_bits<float>(x); }
DEVICE i64 __double_as_longlong(double x) { return emulated_bits<i64>(x); }
DEVICE double __longlong_as_double(i64 x) { return emulated_bits<double>(x); }
DEVICE int __popc(u32 x) { return __builtin_popcount(x); }
DEVICE int __popcll(u64 x) { return __builtin_popcountll(x); }
DEVICE int __clz(int x) { return x ? __builtin_clz((u32)x) : 32; }
DEVICE int __clzll(i64 x) { return x ? __builtin_clzll((u64)x) : 64; }
DEVICE int __ffs(int x) { return __builtin_ffs(x); }
DEVICE int __ffsll(i64 x) { return __builtin_ffsll(x); }
DEVICE u32 __brev(u32 x) {
    u32 y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
DEVICE u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
DEVICE int __mulhi(int a, int b) { return (int)((i64)a * b >> 32); }
DEVICE u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
DEVICE u32 __funnelshift_l(u32 low, u32 high, u32 by) { return (u32)((((u64)high << 32 | low) << (by & 31)) >> 32); }
DEVICE u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
// NVRTC takes the low three bits of each nibble.
DEVICE u32 __byte_perm(u32 a, u32 b, u32 which) {
    u64 bytes = (u64)b << 32 | a;
    u32 v = 0;
    for (int i = 0; i < 4; i++) v |= (u32)(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return v;
}
DEVICE int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (i8)((u32)a >> 8 * i) * (i8)((u32)b >> 8 * i);
    return c;
}
DEVICE u32 __dp4a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}

// -- memory ---------------------------------------------------------------------------------------------------------

template <class T>
DEVICE T __ldg(const T* at) { return *at; }
template <class T>
DEVICE T __ldcs(const T* at) { return *at; }
template <class T>
DEVICE T __ldcg(const T* at) { return *at; }
template <class T>
DEVICE void __stcs(T* at, T x) { *at = x; }
template <class T>
DEVICE void __stcg(T* at, T x) { *at = x; }
extern "C" void* memcpy(void*, const void*, size_t);
extern "C" void* memset(void*, int, size_t);

// -- numbers --------------------------------------------------------------------------------------------------------

#define ONE(of)                                                                                                           \
    extern "C" float of##f(float);                                                                                        \
    extern "C" double of(double);                                                                                         \
    DEVICE float of(float x) { return of##f(x); }
#define TWO(of)                                                                                                           \
    extern "C" float of##f(float, float);                                                                                 \
    extern "C" double of(double, double);                                                                                 \
    DEVICE float of(float x, float y) { return of##f(x, y); }
ONE(exp) ONE(exp2) ONE(exp10) ONE(expm1) ONE(log) ONE(log2) ONE(log10) ONE(log1p) ONE(sin) ONE(cos) ONE(tan) ONE(sinh) ONE(cosh)
ONE(tanh) ONE(asin) ONE(acos) ONE(atan) ONE(erf) ONE(erfc) ONE(sqrt) ONE(cbrt) ONE(floor) ONE(ceil) ONE(trunc) ONE(round)
ONE(rint) ONE(nearbyint) ONE(fabs)
TWO(pow) TWO(fmod) TWO(fmin) TWO(fmax) TWO(atan2) TWO(copysign) TWO(hypot) TWO(fdim)
#undef ONE
#undef TWO
extern "C" {
float fmaf(float, float, float);
double fma(double, double, double);
float ldexpf(float, int);
double ldexp(double, int);
float frexpf(float, int*);
int abs(int);
long long llabs(long long);
long lrintf(float);
long lroundf(float);
}
DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float abs(float x) { return fabsf(x); }
DEVICE i64 abs(i64 x) { return llabs(x); }
DEVICE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
DEVICE double rsqrt(double x) { return 1.0 / sqrt(x); }
DEVICE void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
DEVICE void sincos(double x, double* s, double* c) { *s = sin(x), *c = cos(x); }
DEVICE bool isnan(float x) { return x != x; }
DEVICE bool isnan(double x) { return x != x; }
DEVICE bool isinf(float x) { return __builtin_isinf(x); }
DEVICE bool isfinite(float x) { return __builtin_isfinite(x); }
DEVICE bool signbit(float x) { return __builtin_signbit(x); }
DEVICE float __expf(float x) { return expf(x); }
DEVICE float __exp2f(float x) { return exp2f(x); }
DEVICE float __logf(float x) { return logf(x); }
DEVICE float __sinf(float x) { return sinf(x); }
DEVICE float __cosf(float x) { return cosf(x); }
DEVICE float __tanhf(float x) { return tanhf(x); }
DEVICE float __fdividef(float x, float y) { return x / y; }
DEVICE float __fadd_rn(float x, float y) { return x + y; }
DEVICE float __fsub_rn(float x, float y) { return x - y; }
DEVICE float __fmul_rn(float x, float y) { return x * y; }
DEVICE float __fdiv_rn(float x, float y) { return x / y; }
DEVICE float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
DEVICE float __fsqrt_rn(float x) { return sqrtf(x); }
DEVICE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
DEVICE float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }
// What does not fit is the nearest that does; what is no number is 0.
DEVICE int emulated_int(float x) { return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : (int)x; }
DEVICE int __float2int_rn(float x) { return emulated_int(rintf(x)); }
DEVICE int __float2int_rz(float x) { return emulated_int(truncf(x)); }
DEVICE int __float2int_rd(float x) { return emulated_int(floorf(x)); }
DEVICE int __float2int_ru(float x) { return emulated_int(ceilf(x)); }
DEVICE float __int2float_rn(int x) { return (float)x; }
DEVICE float __uint2float_rn(u32 x) { return (float)x; }

#define SMALLEST(A, B, T)                                                                                                 \
    DEVICE T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }                                                          \
    DEVICE T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }
SMALLEST(int, int, int)
SMALLEST(u32, u32, u32)
SMALLEST(int, u32, u32)
SMALLEST(u32, int, u32)
SMALLEST(long, long, long)
SMALLEST(unsigned long, unsigned long, unsigned long)
SMALLEST(i64, i64, i64)
SMALLEST(u64, u64, u64)
SMALLEST(i64, u64, u64)
SMALLEST(u64, i64, u64)
#undef SMALLEST
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE double min(double a, double b) { return fmin(a, b); }
DEVICE double max(double a, double b) { return fmax(a, b); }
