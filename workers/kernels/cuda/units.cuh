// Packed weights as matrix instructions take them: a thread's units of a group of four chunks, and what they are as halves.

// Groups of a row fall into slices, g into g % N_SLICES, which are summed by themselves and then added in order.
#define N_SLICES 8

// Which of a launch's tensors a tile of rows is of.
template <class A>
DEVICE int part_of(const A& a, int tile) {
    return (tile >= (int)a.begin[1]) + (tile >= (int)a.begin[2]) + (tile >= (int)a.begin[3]);
}

#if IS(BF16)
#define MULTIPLY mma_bf16s
#else
#define MULTIPLY mma_halves
#endif

// Codes are taken 32 times as large: weights of trained models would else be halves that are subnormal.
#define LARGER_BITS 5
#define LARGER (1 << LARGER_BITS)
#define UNDO (CODES ? 1.0f / LARGER : 1.0f)

// What a thread reads of a row's group: its units of four chunks, and their scales.
struct Units {
#if WORD_BYTES
    u32 words[16];
#elif BYTE_BYTES
    u32 bytes[8];
#endif
#if NIBBLE_BYTES
    u32 nibbles[4];
#endif
#if TWO_BYTES
    u32 twos[2];
#endif
#if ONE_BYTES
    u32 ones;
#endif
#if CODES
    u32 scales[4];
    u32 more;
#endif
};

#define SET16(to, at)                                        \
    {                                                        \
        uint4 v = stream16(at);                              \
        (to)[0] = v.x, (to)[1] = v.y, (to)[2] = v.z, (to)[3] = v.w; \
    }

// Where a thread's units begin of a packed tensor whose rows are in whole tiles of 16.
struct Source {
    const u8 *codes, *twos, *ones, *scales, *more;
};

DEVICE Source source_of(const Planes& p, int lane) {
    int g = lane / 4;
    Source s;
    s.codes = p.codes + 16 * lane;
    s.twos = p.twos + TWO_BYTES * lane;
    s.ones = p.ones + ONE_BYTES * lane;
    s.scales = p.scales + (SUPER ? g : GROUP * g) * SCALE_BYTES;
    s.more = p.more + g * MORE_BYTES;
    return s;
}

// A whole group of them: of rows g for half 0, g + 8 for half 1. What `load_group` gives, with less to work out. `before`: chunks of
// all rows before those of this group.
DEVICE void load_units(const Source& s, u32 before, int half, Units& u) {
    const u8* codes = s.codes + (u64)before * (WORD_BYTES + BYTE_BYTES + NIBBLE_BYTES) + half * 512;
#if WORD_BYTES
    for (int i = 0; i < 4; i++) SET16(u.words + 4 * i, codes + 1024 * i);
#elif BYTE_BYTES
    for (int i = 0; i < 2; i++) SET16(u.bytes + 4 * i, codes + 1024 * i);
#elif NIBBLE_BYTES
    SET16(u.nibbles, codes);
#endif
#if TWO_BYTES
    uint2 twos = *(const uint2*)(s.twos + (u64)before * TWO_BYTES + half * 256);
    u.twos[0] = twos.x, u.twos[1] = twos.y;
#endif
#if ONE_BYTES
    u.ones = *(const u32*)(s.ones + (u64)before * ONE_BYTES + half * 128);
#endif
#if CODES
    u64 blocks = SUPER ? before / (TILE * BLOCK_CHUNKS) * TILE : before;
    const u8* scales = s.scales + blocks * SCALE_BYTES + half * 8 * (SUPER ? 1 : GROUP) * SCALE_BYTES;
    const int n_words = SUPER ? SCALE_BYTES / 4 : SCALE_BYTES;
    if (n_words == 4) SET16(u.scales, scales);
    if (n_words == 2) {
        uint2 v = *(const uint2*)scales;
        u.scales[0] = v.x, u.scales[1] = v.y;
    }
    if (n_words % 2)
        for (int i = 0; i < n_words; i++) u.scales[i] = ((const u32*)scales)[i];
    if (MORE_BYTES == 2) u.more = *(const u16*)(s.more + blocks * MORE_BYTES + half * 8 * MORE_BYTES);
    if (MORE_BYTES == 4) u.more = *(const u32*)(s.more + blocks * MORE_BYTES + half * 8 * MORE_BYTES);
#endif
}

// All four chunks are there: whole words.
DEVICE void load_group(const Planes& p, const Row& r, i64 group, int t, Units& u) {
#if WORD_BYTES
    for (int c = 0; c < GROUP; c++) SET16(u.words + 4 * c, p.codes + unit_at(p, r, group, c, t, 16));
#elif BYTE_BYTES
    for (int i = 0; i < 2; i++) SET16(u.bytes + 4 * i, p.codes + unit_at(p, r, group, 2 * i, t, 8));
#endif
#if NIBBLE_BYTES
    SET16(u.nibbles, p.codes + unit_at(p, r, group, 0, t, 4));
#endif
#if TWO_BYTES
    uint2 twos = *(const uint2*)(p.twos + unit_at(p, r, group, 0, t, 2));
    u.twos[0] = twos.x, u.twos[1] = twos.y;
#endif
#if ONE_BYTES
    u.ones = *(const u32*)(p.ones + unit_at(p, r, group, 0, t, 1));
#endif
#if CODES && !SUPER
    const u8* scales = p.scales + scale_at(p, r, group * GROUP, SCALE_BYTES);
#if SCALE_BYTES == 1
    u.scales[0] = *(const u32*)scales;
#elif SCALE_BYTES == 2
    uint2 v = *(const uint2*)scales;
    u.scales[0] = v.x, u.scales[1] = v.y;
#else
    SET16(u.scales, scales);
#endif
#endif
}

// Fewer chunks are there, of a row that is no multiple of a group: unit by unit.
DEVICE void load_part(const Planes& p, const Row& r, i64 group, int n, int t, Units& u) {
#if TWO_BYTES
    u.twos[0] = u.twos[1] = 0;
#endif
#if ONE_BYTES
    u.ones = 0;
#endif
#if CODES && !SUPER
    for (int i = 0; i < 4; i++) u.scales[i] = 0;
#endif
#pragma unroll
    for (int c = 0; c < GROUP; c++) {
#if WORD_BYTES
        uint4 zero = {0, 0, 0, 0};
        uint4 v = c < n ? *(const uint4*)(p.codes + unit_at(p, r, group, c, t, 16)) : zero;
        u.words[4 * c] = v.x, u.words[4 * c + 1] = v.y, u.words[4 * c + 2] = v.z, u.words[4 * c + 3] = v.w;
#elif BYTE_BYTES
        uint2 zero = {0, 0};
        uint2 v = c < n ? *(const uint2*)(p.codes + unit_at(p, r, group, c, t, 8)) : zero;
        u.bytes[2 * c] = v.x, u.bytes[2 * c + 1] = v.y;
#endif
#if NIBBLE_BYTES
        u.nibbles[c] = c < n ? *(const u32*)(p.codes + unit_at(p, r, group, c, t, 4)) : 0;
#endif
#if TWO_BYTES
        if (c < n) u.twos[c / 2] |= (u32) * (const u16*)(p.twos + unit_at(p, r, group, c, t, 2)) << 16 * (c % 2);
#endif
#if ONE_BYTES
        if (c < n) u.ones |= (u32)p.ones[unit_at(p, r, group, c, t, 1)] << 8 * c;
#endif
#if CODES && !SUPER
        if (c < n) {
            const u8* scales = p.scales + scale_at(p, r, group * GROUP + c, SCALE_BYTES);
            for (int i = 0; i < SCALE_BYTES; i++)
                u.scales[(c * SCALE_BYTES + i) / 4] |= (u32)scales[i] << 8 * ((c * SCALE_BYTES + i) % 4);
        }
#endif
    }
}

DEVICE void load(const Planes& p, const Row& r, i64 group, int n, int t, Units& u) {
    if (n == GROUP)
        load_group(p, r, group, t, u);
    else
        load_part(p, r, group, n, t, u);
#if SUPER
    const u8* scales = p.scales + scale_at(p, r, group * GROUP, SCALE_BYTES);
#if SCALE_BYTES == 16
    SET16(u.scales, scales);
#elif SCALE_BYTES == 12
    for (int i = 0; i < 3; i++) u.scales[i] = ((const u32*)scales)[i];
#else
    uint2 v = *(const uint2*)scales;
    u.scales[0] = v.x, u.scales[1] = v.y;
#endif
#if MORE_BYTES
    const u8* more = p.more + scale_at(p, r, group * GROUP, MORE_BYTES);
    u.more = MORE_BYTES == 2 ? (u32) * (const u16*)more : *(const u32*)more;
#endif
#endif
}

// Two bytes of a word, as `which` chooses them, each as a half from 1024 on.
DEVICE u32 byte_halves(u32 word, u32 which) { return choose_bytes(word, 0x64646464u, which); }

// Halves times LARGER, or less than nothing.
DEVICE u32 larger(u32 v) { return mul_halves(v, 0x50005000u); }
DEVICE u32 less(u32 v) { return mul_halves(v, 0xd000d000u); }

// What the codes of a thread's units of chunks 2p and 2p + 1 are multiplied by, and what is added then, LARGER times as large: of the
// first in the low half, of the second in the high one. `odd`: the second group of a block of 256. Whole numbers times a half are
// rounded once.
struct ScalePair {
    u32 scale, more;
};

DEVICE ScalePair scale_pair(const Units& u, int p, int odd, int t) {
    ScalePair s = {0, 0};
    // of a chunk's two scales that of the thread's half; or of four chunks' one each
    u32 halves = 0x4240u + 0x0101u * (t / 2), chunks = p ? 0x4342u : 0x4140u;
#if IS(Q4_0) || IS(Q5_0) || IS(Q8_0) || IS(IQ4_NL)
    s.scale = u.scales[p];
#elif IS(Q4_1) || IS(Q5_1)
    s.scale = choose_bytes(u.scales[2 * p], u.scales[2 * p + 1], 0x5410);
    s.more = larger(choose_bytes(u.scales[2 * p], u.scales[2 * p + 1], 0x7632));
#elif IS(MXFP4)
    u8 first = (u8)(u.scales[0] >> 16 * p), second = (u8)(u.scales[0] >> (16 * p + 8));
    s.scale = halves_of(scale_of(&first, &first, 0, 0).scale, scale_of(&second, &second, 0, 0).scale);
#elif IS(Q4_K) || IS(Q5_K)
    // six bits each: the first four lie together, of the others the high two bits lie above those
    u32 low = odd ? 0x0f0f0f0fu : 0x3f3f3f3fu, top = odd ? 0x30303030u : 0;
    u32 n = keep_bits(u.scales[1] >> 2, top, (odd ? u.scales[3] : u.scales[1]) & low);
    u32 m = keep_bits(u.scales[2] >> 2, top, (odd ? u.scales[3] >> 4 : u.scales[2]) & low);
    s.scale = mul_halves(sub_halves(byte_halves(n, chunks), 0x64006400u), low_half_twice(u.scales[0]));
    s.more = mul_halves(sub_halves(byte_halves(m, chunks), 0x64006400u), less(high_half_twice(u.scales[0])));
#elif IS(Q6_K)
    u32 n = (odd ? u.scales[2 + p] : u.scales[p]) ^ 0x80808080u;
    s.scale = mul_halves(sub_halves(byte_halves(n, halves), 0x64806480u), low_half_twice(u.more));
#elif IS(Q2_K)
    u32 w = odd ? u.scales[2 + p] : u.scales[p];
    u32 n = byte_halves(w & 0x0f0f0f0fu, halves), m = byte_halves(w >> 4 & 0x0f0f0f0fu, halves);
    s.scale = mul_halves(sub_halves(n, 0x64006400u), low_half_twice(u.more));
    s.more = mul_halves(sub_halves(m, 0x64006400u), less(high_half_twice(u.more)));
#elif IS(Q3_K)
    u32 n = (u.scales[p] >> 4 * odd & 0x0f0f0f0fu) | (u.scales[2] >> (4 * odd + 2 * p) & 0x03030303u) << 4;
    s.scale = mul_halves(sub_halves(byte_halves(n, halves), 0x64206420u), low_half_twice(u.more));
#elif IS(IQ4_XS)
    u32 low = u.scales[1] >> (16 * odd + 8 * p), high = u.scales[0] >> (16 + 8 * odd + 4 * p);
    u32 n = 0x64006400u | (low & 15) | (low & 0xf0) << 12 | (high & 3) << 4 | (high & 12) << 18;
    s.scale = mul_halves(sub_halves(n, 0x64206420u), low_half_twice(u.scales[0]));
#endif
    return s;
}

#if CODES
// A whole number of at most eleven bits before the last that is not 0, as a half, twice in a word.
DEVICE constexpr u32 whole_halves(u32 n) {
    u32 exponent = 0;
    while (n >> (exponent + 1)) exponent++;
    u32 half = (15 + exponent) << 10 | (exponent > 10 ? n >> (exponent - 10) : n << (10 - exponent)) % 1024;
    return half | half << 16;
}

// Halves of 1024 + 2^shift * code, as halves of LARGER * (code - zero). What is added has at most eleven bits, so nothing is lost.
template <int SHIFT>
DEVICE u32 centred(u32 v, u32 zero) {
    const u32 factor = (15 + LARGER_BITS - SHIFT) * 0x04000400u;  // LARGER / 2^shift
    return fma_halves(v, factor, whole_halves(((1024 >> SHIFT) + zero) * LARGER) | 0x80008000u);
}

// The pair i of codes of chunk c, less ZERO, LARGER times as large. Bits are taken where they lie, as far as a half from 1024 on has room for them.
#if HAS_TABLE
DEVICE void code_pairs(const Units& u, int c, u32 (&v)[4]) {
    u32 which = u.nibbles[c], far = (which & 0x88888888u) >> 1 | 0x32103210u;
    u32 low = which & 0x77777777u, high = low >> 16;
    u32 even = choose_bytes(choose_bytes(TABLE_0, TABLE_1, low), choose_bytes(TABLE_2, TABLE_3, low), far);
    u32 odd = choose_bytes(choose_bytes(TABLE_0, TABLE_1, high), choose_bytes(TABLE_2, TABLE_3, high), far >> 16);
    for (int i = 0; i < 4; i++) {
        v[i] = choose_bytes(even, odd, (u32)(i | i << 4 | (4 + i) << 8 | i << 12));
        v[i] = centred<0>(keep_bits(v[i], 0x00ff00ffu, 0x64006400u), 128);
    }
}
#elif BYTE_BYTES
DEVICE void code_pairs(const Units& u, int c, u32 (&v)[4]) {
    for (int i = 0; i < 4; i++) {
        u32 bytes = u.bytes[2 * c + i / 2] ^ 0x80808080u;
        v[i] = centred<0>(choose_bytes(bytes, 0x64646464u, i % 2 ? 0x4342u : 0x4140u), ZERO);
    }
}
#else
template <int I>
DEVICE u32 code_pair(u32 nibble, u32 two, u32 one) {
    const int shift = NIBBLE_BYTES ? I % 2 * 4 : 2 * I, bits = NIBBLE_BYTES ? 4 : 2;
    u32 v = NIBBLE_BYTES ? keep_bits(nibble >> I / 2 * 8, 0x000f000fu << shift, 0x64006400u)
                         : keep_bits(two, 0x00030003u << shift, 0x64006400u);
    if (NIBBLE_BYTES && TWO_BYTES) v = keep_bits(two << (shift + bits - 2 * I), 0x00030003u << (shift + bits), v);
    if (ONE_BYTES) v = keep_bits(one << (shift + bits - I), 0x00010001u << (shift + bits), v);
    return centred<shift>(v, ZERO);
}

DEVICE void code_pairs(const Units& u, int c, u32 (&v)[4]) {
    u32 nibble = 0, two = 0, one = 0;
#if NIBBLE_BYTES
    nibble = u.nibbles[c];
#endif
#if TWO_BYTES
    two = choose_bytes(u.twos[c / 2], 0, c % 2 ? 0x4342 : 0x4140);
#endif
#if ONE_BYTES
    one = u.ones >> 8 * c;
    one = (one & 15) | (one & 0xf0u) << 12;
#endif
    v[0] = code_pair<0>(nibble, two, one);
    v[1] = code_pair<1>(nibble, two, one);
    v[2] = code_pair<2>(nibble, two, one);
    v[3] = code_pair<3>(nibble, two, one);
}
#endif
#endif

// The eight weights of a thread's unit of chunk c, as pairs. `s`: the scales of the two chunks of which it is one.
DEVICE void weights(const Units& u, const ScalePair& s, int c, u32 (&v)[4]) {
#if WORD_BYTES
    for (int i = 0; i < 4; i++) v[i] = u.words[4 * c + i];
#else
    u32 scale = c % 2 ? high_half_twice(s.scale) : low_half_twice(s.scale);
    u32 more = c % 2 ? high_half_twice(s.more) : low_half_twice(s.more);
    code_pairs(u, c, v);
    for (int i = 0; i < 4; i++) {
#if HAS_MIN
        v[i] = fma_halves(v[i], scale, more);
#else
        v[i] = mul_halves(v[i], scale);
#endif
    }
#endif
}
