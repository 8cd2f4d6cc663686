// An element of a block as it lies in a file. Arithmetic is that of ggml's reference rows, so values are its own bits.
// Source: the block structs of ggml-common.h.

enum Block { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20,
             IQ4_XS = 23, TQ1_0 = 34, TQ2_0 = 35, MXFP4 = 39, NVFP4 = 40, Q1_0 = 41, Q2_0 = 42 };

DEVICE int block_elements(i64 type) {
    if ((type >= Q2_K && type <= Q6_K) || type == IQ4_XS || type == TQ1_0 || type == TQ2_0) return 256;
    return type == Q1_0 ? 128 : type == NVFP4 || type == Q2_0 ? 64 : 32;
}

DEVICE float half_at(const u8* at) { return float_of_half((u16)(at[0] | at[1] << 8)); }

__constant__ i8 IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
__constant__ i8 MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The nibble of element i: 16 low ones, then 16 high ones.
DEVICE int nibble(const u8* q, int i) { return q[i & 15] >> (i & 16 ? 4 : 0) & 15; }
DEVICE int bit_of(const u8* at, int i) { return at[i / 8] >> (i & 7) & 1; }

// Two bits: 32 bytes hold 128 elements, 32 a shift.
DEVICE int crumb(const u8* q, int i) { return q[i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3; }

// 2^(e - 128).
DEVICE float half_power(u8 e) { return __uint_as_float(e < 2 ? 0x00200000u << e : (u32)(e - 1) << 23); }

// Of Q4_K and Q5_K: six bits each of eight scales and minima.
DEVICE int packed_scale(const u8* s, int g) { return g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4; }
DEVICE int packed_least(const u8* s, int g) { return g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4; }

DEVICE float affine(const u8* b, int i, int q) {
    int g = i / 32;
    return half_at(b) * (float)packed_scale(b + 4, g) * (float)q - half_at(b + 2) * (float)packed_least(b + 4, g);
}

DEVICE float q3_k(const u8* b, int i) {
    int g = i / 16, low = b[96 + (g & 7)] >> (g & 8 ? 4 : 0) & 15, high = b[104 + (g & 3)] >> g / 4 * 2 & 3;
    int q = crumb(b + 32, i) - 4 * (1 - (b[i % 32] >> i / 32 & 1));
    return half_at(b + 108) * (float)((low | high << 4) - 32) * (float)q;
}

DEVICE float q6_k(const u8* b, int i) {
    int low = b[i / 128 * 64 + i % 64] >> (i & 64 ? 4 : 0) & 15, high = b[128 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3;
    return (float)(i8)b[192 + i / 16] * half_at(b + 208) * (float)((low | high << 4) - 32);
}

DEVICE float iq4_xs(const u8* b, int i) {
    int g = i / 32, high = (b[2] | b[3] << 8) >> 2 * g & 3, low = b[4 + g / 2] >> (g & 1 ? 4 : 0) & 15;
    return half_at(b) * ((float)(low | high << 4) - 32.0f) * (float)IQ4_VALUES[nibble(b + 8 + 16 * g, i & 31)];
}

// Without a sign: four bits of exponent, three of mantissa; halved because the table of values is doubled.
DEVICE float ue4m3(u8 b) {
    if (b == 0 || b == 0x7f) return 0.0f;
    int exponent = b >> 3 & 15, mantissa = b & 7;
    return exponent ? (float)(8 + mantissa) * __uint_as_float((u32)(exponent + 116) << 23) : (float)mantissa * 0x1p-10f;
}

DEVICE float nvfp4(const u8* b, int i) {
    int g = i / 16;
    return (float)MXFP4_VALUES[b[4 + 8 * g + i % 8] >> (i & 8 ? 4 : 0) & 15] * ue4m3(b[g]);
}

// Five digits of base 3 in a byte: 32 bytes hold 160 elements, 16 hold 80, and 4 hold 16.
DEVICE float tq1_0(const u8* b, int i) {
    int power = i < 160 ? i / 32 : i < 240 ? (i - 160) / 16 : (i - 240) / 4;
    u8 q = b[i < 160 ? i % 32 : i < 240 ? 32 + i % 16 : 48 + i % 4];
    for (int p = 0; p < power; p++) q = (u8)(q * 3);
    return (float)((q * 3 >> 8) - 1) * half_at(b + 52);
}

DEVICE float block_element(i64 type, const u8* b, int i) {
    switch ((int)type) {
        case Q4_0: return ((float)nibble(b + 2, i) - 8.0f) * half_at(b);
        case Q4_1: return (float)nibble(b + 4, i) * half_at(b) + half_at(b + 2);
        case Q5_0: return ((float)(nibble(b + 6, i) | bit_of(b + 2, i) << 4) - 16.0f) * half_at(b);
        case Q5_1: return (float)(nibble(b + 8, i) | bit_of(b + 4, i) << 4) * half_at(b) + half_at(b + 2);
        case Q8_0: return (float)(i8)b[2 + i] * half_at(b);
        case IQ4_NL: return (float)IQ4_VALUES[nibble(b + 2, i)] * half_at(b);
        case MXFP4: return (float)MXFP4_VALUES[nibble(b + 1, i)] * half_power(b[0]);
        case Q2_K:
            return half_at(b + 80) * (float)(b[i / 16] & 15) * (float)crumb(b + 16, i) - half_at(b + 82) * (float)(b[i / 16] >> 4);
        case Q3_K: return q3_k(b, i);
        case Q4_K: return affine(b, i, b[16 + i / 64 * 32 + i % 32] >> (i & 32 ? 4 : 0) & 15);
        case Q5_K: {
            int low = b[48 + i / 64 * 32 + i % 32] >> (i & 32 ? 4 : 0) & 15;
            return affine(b, i, low | (b[16 + i % 32] >> i / 32 & 1) << 4);
        }
        case Q6_K: return q6_k(b, i);
        case IQ4_XS: return iq4_xs(b, i);
        case TQ1_0: return tq1_0(b, i);
        case TQ2_0: return (float)(crumb(b, i) - 1) * half_at(b + 64);
        case NVFP4: return nvfp4(b, i);
        case Q1_0: return (float)(2 * bit_of(b + 2, i) - 1) * half_at(b);
        case Q2_0: return (float)((b[2 + i / 4] >> 2 * (i & 3) & 3) - 1) * half_at(b);
    }
    return 0.0f;
}
