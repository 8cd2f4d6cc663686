// Packed weights as matrix instructions take them: a thread's units of a group of four chunks, and what they are as halves.

#if IS(BF16)
#define MULTIPLY mma_bf16s
#else
#define MULTIPLY mma_halves
#endif

// Scales are taken 64 times as large: weights of trained models would else have halves that are subnormal.
#define LARGER 64.0f
#define UNDO (CODES ? 1 / LARGER : 1.0f)

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

#if CODES
DEVICE u32 byte_of(const u32 (&words)[4], int i) { return words[i / 4] >> 8 * (i % 4) & 255; }

// Scale and minimum of a thread's units of chunk c of a group; odd: the second group of a block of 256.
DEVICE Scale unit_scale(const Units& u, int c, int odd, int t) {
    u8 scales[16], more[4];
#if SUPER
    for (int i = 0; i < SCALE_BYTES; i++) scales[i] = (u8)byte_of(u.scales, i);
    for (int i = 0; i < MORE_BYTES; i++) more[i] = (u8)(u.more >> 8 * i);
    // both are worked out, so that no index into registers depends on the group
    Scale low = scale_of(scales, more, c, 0), high = scale_of(scales, more, c + GROUP, 0);
    if (SCALE_BYTES != 8 && !IS(Q4_K) && !IS(Q5_K)) {
        Scale low1 = scale_of(scales, more, c, 1), high1 = scale_of(scales, more, c + GROUP, 1);
        low.scale = t < 2 ? low.scale : low1.scale, high.scale = t < 2 ? high.scale : high1.scale;
        low.min = t < 2 ? low.min : low1.min, high.min = t < 2 ? high.min : high1.min;
    }
    low.scale = odd ? high.scale : low.scale, low.min = odd ? high.min : low.min;
    return low;
#else
    for (int i = 0; i < SCALE_BYTES; i++) scales[i] = (u8)byte_of(u.scales, c * SCALE_BYTES + i);
    return scale_of(scales, more, 0, 0);
#endif
}

// The pair i of codes of chunk c, each as a half from 1024 on.
DEVICE void code_pairs(const Units& u, int c, u32 (&v)[4]) {
#if HAS_TABLE
    u32 which = u.nibbles[c], far = (which & 0x88888888u) >> 1 | 0x32103210u;
    u32 low = which & 0x77777777u, high = low >> 16;
    u32 even = choose_bytes(choose_bytes(TABLE_0, TABLE_1, low), choose_bytes(TABLE_2, TABLE_3, low), far);
    u32 odd = choose_bytes(choose_bytes(TABLE_0, TABLE_1, high), choose_bytes(TABLE_2, TABLE_3, high), far >> 16);
    for (int i = 0; i < 4; i++) v[i] = (choose_bytes(even, odd, (u32)(i | i << 4 | (4 + i) << 8 | i << 12)) & 0x00ff00ffu) | 0x64006400u;
#elif BYTE_BYTES
    for (int i = 0; i < 4; i++)
        v[i] = choose_bytes(u.bytes[2 * c + i / 2] ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342u : 0x4140u);
#else
#if TWO_BYTES
    u32 two = u.twos[c / 2] >> 16 * (c % 2);
    two = (two & 255) | (two & 0xff00u) << 8;
#endif
#if ONE_BYTES
    u32 one = u.ones >> 8 * c;
    one = (one & 15) | (one & 0xf0u) << 12;
#endif
    for (int i = 0; i < 4; i++) {
        v[i] = 0x64006400u;
#if NIBBLE_BYTES
        v[i] |= u.nibbles[c] >> 4 * i & 0x000f000fu;
#endif
#if TWO_BYTES
        v[i] |= (two >> 2 * i & 0x00030003u) << (NIBBLE_BYTES ? 4 : 0);
#endif
#if ONE_BYTES
        v[i] |= (one >> i & 0x00010001u) << (NIBBLE_BYTES ? 4 : 2);
#endif
    }
#endif
}
#endif

// The eight weights of a thread's unit of chunk c, as pairs.
DEVICE void weights(const Units& u, int c, int odd, int t, u32 (&v)[4]) {
#if WORD_BYTES
    for (int i = 0; i < 4; i++) v[i] = u.words[4 * c + i];
#else
    Scale s = unit_scale(u, c, odd, t);
    u32 scale = halves_of(s.scale * LARGER, s.scale * LARGER);
    u32 zero = halves_of(1024.0f + (HAS_TABLE ? 128 : ZERO), 1024.0f + (HAS_TABLE ? 128 : ZERO));
    code_pairs(u, c, v);
    for (int i = 0; i < 4; i++) {
        v[i] = sub_halves(v[i], zero);
#if HAS_MIN
        v[i] = fma_halves(v[i], scale, halves_of(-s.min * LARGER, -s.min * LARGER));
#else
        v[i] = mul_halves(v[i], scale);
#endif
    }
#endif
}

