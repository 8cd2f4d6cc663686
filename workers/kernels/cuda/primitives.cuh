// What kernels use of the machine beyond C++: numbers of 16 bits, matrix instructions, loads past the first cache, copies to shared
// memory, what is in front of and behind a kernel.
// Kernels have no other assembly and include no header, so a host's compiler can take them over other primitives.
// Source: the PTX ISA (cvt, fma.f16x2, mma.sync.m16n8k16, ldmatrix, ld.global.nc, prefetch, cp.async, griddepcontrol).

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define INFINITE __int_as_float(0x7f800000)
#define DEVICE __device__ __forceinline__
// Of how many threads a block has at most, and how many blocks a processor is to have at once, if that is said.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
// Shared memory whose size the launch says (`Grid.shared`): `bytes`, as the kernel counts them.
#define ROOM(name, bytes) extern __shared__ __align__(128) u8 name[]

// -- the kernels around this one --------------------------------------------------------------------------------------

// The next kernel may be brought to the processors once all blocks have said so. It still waits until this one is done.
DEVICE void next_may_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All that was launched before is done, and what it wrote is there. Every kernel has this before it reads what another writes, and
// before it writes.
DEVICE void previous_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void begin() {
    next_may_come();
    previous_done();
}

// -- numbers of 16 bits ---------------------------------------------------------------------------------------------

DEVICE float float_of_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE u16 half_of(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

DEVICE float float_of_bf16(u16 h) { return __uint_as_float((u32)h << 16); }

DEVICE u16 bf16_of(float f) {
    u32 bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 64);
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Two halves in a word, the first in its low bits.
DEVICE u32 pair(u16 low, u16 high) { return (u32)low | (u32)high << 16; }

DEVICE u32 halves_of(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

DEVICE u32 sub_halves(u32 a, u32 b) {
    u32 v;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

DEVICE u32 mul_halves(u32 a, u32 b) {
    u32 v;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// a * b + c, rounded once.
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 v;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}

// A word's low half twice, and its high half. Instructions take either half for both, so this costs none.
DEVICE u32 low_half_twice(u32 v) {
    u32 w;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low};}" : "=r"(w) : "r"(v));
    return w;
}
DEVICE u32 high_half_twice(u32 v) {
    u32 w;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high};}" : "=r"(w) : "r"(v));
    return w;
}

// -- bytes ----------------------------------------------------------------------------------------------------------

// Bytes of b:a (a has numbers 0 to 3), chosen by the low three bits of each nibble of `which`.
DEVICE u32 choose_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }

// x, which is kept in registers where the compiler would rather work it out again.
DEVICE u32 held(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
DEVICE const u8* held(const u8* x) {
    asm volatile("" : "+l"(x));
    return x;
}

// The bits of x that a mask has, and all of y.
DEVICE u32 keep_bits(u32 x, u32 mask, u32 y) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(x), "r"(mask), "r"(y));
    return v;
}

// Sixteen bytes that are read once.
DEVICE uint4 stream16(const void* at) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

// What will be read soon is brought into the second cache.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// -- copies to shared memory ------------------------------------------------------------------------------------------

// Sixteen bytes, at multiples of 16 on both sides; they come later. Who fetched may read them after `fetched`.
DEVICE void fetch16(void* shared, const void* at) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(at) : "memory");
}

// The same, or zeros where not `is`; then nothing is read.
DEVICE void fetch16_or_zeros(void* shared, const void* at, bool is) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(at), "r"(is ? 16 : 0) : "memory");
}

// What this thread has fetched since the last time is one lot.
DEVICE void end_of_lot() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until of this thread's lots only the last N are on their way.
template <int N>
DEVICE void fetched() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// -- matrices -------------------------------------------------------------------------------------------------------

// d += a b, float16 to float32. With g = lane / 4 and t = lane % 4: a has rows g, g + 8 of 16 and k = 2t, 2t + 8 (two each);
// b column g of 8 and the same k; d rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t + 1.
DEVICE void mma_halves(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same of bfloat16.
DEVICE void mma_bf16s(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers from shared memory, each transposed: lane l gives the address of row l % 8 of matrix
// l / 8, and gets of each matrix the column l / 4, rows 2 (l % 4) and the one behind it. Addresses are multiples of 16.
DEVICE void load_transposed(u32 (&v)[4], const void* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
