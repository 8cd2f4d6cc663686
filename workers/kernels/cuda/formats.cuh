// Block formats: how a chunk of 32 weights lies in GGUF's blocks, and how packed in planes (planes.py).
//
// A thread of a warp's product holds eight elements of a chunk, 8t to 8t + 7 for t = lane % 4, as four pairs of halves. So a plane
// keeps for each row and chunk four units, one for each t: of a plane of 4, 2 or 1 bits a unit has the low halves of its pairs
// (elements 0, 2, 4, 6) in its low half and the others in its high half; units of 8 and 16 bits a weight are as they were.
// Source of the formats: the block structs of ggml-common.h.

#define Q4_0 0
#define Q4_1 1
#define Q5_0 2
#define Q5_1 3
#define Q8_0 4
#define IQ4_NL 5
#define MXFP4 6
#define Q4_K 7
#define Q5_K 8
#define Q6_K 9
#define Q2_K 10
#define Q3_K 11
#define IQ4_XS 12
#define F16 13
#define BF16 14

#define IS(a) (FORMAT == a)
#define SUPER (IS(Q4_K) || IS(Q5_K) || IS(Q6_K) || IS(Q2_K) || IS(Q3_K) || IS(IQ4_XS))

#define BLOCK (SUPER ? 256 : 32)
#define BLOCK_CHUNKS (BLOCK / 32)
#define TILE 16
#define GROUP 4

// Bytes of a chunk in each plane of codes: of 16, 8, 4, 2 and 1 bits.
#define WORD_BYTES (IS(F16) || IS(BF16) ? 64 : 0)
#define BYTE_BYTES (IS(Q8_0) ? 32 : 0)
#define NIBBLE_BYTES (WORD_BYTES || BYTE_BYTES || IS(Q2_K) || IS(Q3_K) ? 0 : 16)
#define TWO_BYTES (IS(Q6_K) || IS(Q2_K) || IS(Q3_K) ? 8 : 0)
#define ONE_BYTES (IS(Q5_0) || IS(Q5_1) || IS(Q5_K) || IS(Q3_K) ? 4 : 0)
// Bytes of a block in each plane of scales.
#define SCALE_BYTES \
    (IS(Q4_0) || IS(Q5_0) || IS(Q8_0) || IS(IQ4_NL) ? 2 : IS(Q4_1) || IS(Q5_1) ? 4 : IS(MXFP4) ? 1 \
     : IS(Q4_K) || IS(Q5_K) || IS(Q6_K) || IS(Q2_K) ? 16 : IS(Q3_K) ? 12 : IS(IQ4_XS) ? 8 : 0)
#define MORE_BYTES (IS(Q6_K) || IS(Q3_K) ? 2 : IS(Q2_K) ? 4 : 0)

#define BLOCK_BYTES \
    (BLOCK_CHUNKS * (WORD_BYTES + BYTE_BYTES + NIBBLE_BYTES + TWO_BYTES + ONE_BYTES) + SCALE_BYTES + MORE_BYTES)

// Where codes and scales begin in a block of GGUF's.
#define QS_AT (IS(Q4_0) || IS(Q8_0) || IS(IQ4_NL) ? 2 : IS(Q4_1) ? 4 : IS(Q5_0) ? 6 : IS(Q5_1) ? 8 : IS(MXFP4) ? 1 \
               : IS(Q4_K) || IS(Q2_K) ? 16 : IS(Q5_K) ? 48 : IS(Q3_K) ? 32 : IS(IQ4_XS) ? 8 : 0)
#define HIGH_AT (IS(Q5_0) ? 2 : IS(Q5_1) ? 4 : IS(Q5_K) ? 16 : IS(Q6_K) ? 128 : 0)
#define SCALE_AT (IS(Q6_K) ? 192 : IS(Q3_K) ? 96 : 0)
#define MORE_AT (IS(Q6_K) ? 208 : IS(Q3_K) ? 108 : IS(Q2_K) ? 80 : 0)

// Codes are numbers from 0 on; ZERO is the one that means 0.
#define ZERO (IS(Q4_0) ? 8 : IS(Q5_0) ? 16 : IS(Q6_K) ? 32 : IS(Q3_K) ? 4 : IS(Q8_0) ? 128 : 0)
#define HAS_MIN (IS(Q4_1) || IS(Q5_1) || IS(Q4_K) || IS(Q5_K) || IS(Q2_K))
#define HAS_TABLE (IS(IQ4_NL) || IS(MXFP4) || IS(IQ4_XS))
#define CODES (!WORD_BYTES)

// What codes of a table mean, four a word, plus 128.
#if HAS_TABLE
#if IS(MXFP4)
#define TABLE_0 0x83828180u
#define TABLE_1 0x8c888684u
#define TABLE_2 0x7d7e7f80u
#define TABLE_3 0x74787a7cu
#else
#define TABLE_0 0x3f2d1801u
#define TABLE_1 0x766a5d4fu
#define TABLE_2 0xa6998d81u
#define TABLE_3 0xf1d9c5b5u
#endif
DEVICE int table(int code) {
    u32 word = code < 8 ? (code < 4 ? TABLE_0 : TABLE_1) : (code < 12 ? TABLE_2 : TABLE_3);
    return (int)(word >> 8 * (code % 4) & 255) - 128;
}
#endif

// -- GGUF's blocks --------------------------------------------------------------------------------------------------

// Where the nibble of element j lies: its byte, and by how much it is shifted.
DEVICE void nibble_at(int j, int& byte, int& shift) {
    if (IS(Q4_K) || IS(Q5_K)) {
        byte = j / 64 * 32 + j % 32;
        shift = j % 64 / 32 * 4;
    } else if (IS(Q6_K)) {
        byte = j / 128 * 64 + j % 64;
        shift = j % 128 / 64 * 4;
    } else {
        byte = j / 32 * 16 + j % 16;
        shift = j % 32 / 16 * 4;
    }
}

// The same of its two bits.
DEVICE void two_at(int j, int& byte, int& shift) {
    byte = j / 128 * 32 + j % 32;
    shift = j % 128 / 32 * 2;
}

// The same of its one bit.
DEVICE void one_at(int j, int& byte, int& shift) {
    byte = IS(Q5_0) || IS(Q5_1) ? j / 8 : j % 32;
    shift = IS(Q5_0) || IS(Q5_1) ? j % 8 : j / 32;
}

// The code of element j: its 4 bits, or 2, in the low bits, then the higher ones. Q8_0: as they are.
DEVICE int block_code(const u8* block, int j) {
    int byte, shift, code = 0;
    if (BYTE_BYTES) return block[QS_AT + j];
    if (NIBBLE_BYTES) {
        nibble_at(j, byte, shift);
        code = block[QS_AT + byte] >> shift & 15;
    }
    if (TWO_BYTES) {
        two_at(j, byte, shift);
        code |= (block[(IS(Q6_K) ? HIGH_AT : QS_AT) + byte] >> shift & 3) << (NIBBLE_BYTES ? 4 : 0);
    }
    if (ONE_BYTES) {
        one_at(j, byte, shift);
        code |= (block[HIGH_AT + byte] >> shift & 1) << (NIBBLE_BYTES ? 4 : 2);
    }
    return code;
}

// Adds the code of element j to a block of zeros.
DEVICE void put_block_code(u8* block, int j, int code) {
    int byte, shift;
    if (BYTE_BYTES) {
        block[QS_AT + j] = (u8)code;
        return;
    }
    if (NIBBLE_BYTES) {
        nibble_at(j, byte, shift);
        block[QS_AT + byte] |= (u8)((code & 15) << shift);
    }
    if (TWO_BYTES) {
        two_at(j, byte, shift);
        block[(IS(Q6_K) ? HIGH_AT : QS_AT) + byte] |= (u8)((code >> (NIBBLE_BYTES ? 4 : 0) & 3) << shift);
    }
    if (ONE_BYTES) {
        one_at(j, byte, shift);
        block[HIGH_AT + byte] |= (u8)((code >> (NIBBLE_BYTES ? 4 : 2) & 1) << shift);
    }
}

// -- planes ---------------------------------------------------------------------------------------------------------

struct Planes {
    const u8 *codes, *twos, *ones, *scales, *more;
    i64 n_all, n_chunks;
};

DEVICE i64 plane_end(i64 at, i64 n_bytes) { return (at + n_bytes + 15) / 16 * 16; }

// Where the planes of a tensor of n_all rows begin.
DEVICE Planes planes_of(i64 w, i64 n_all, i64 k) {
    Planes p;
    i64 n_chunks = k / 32, n = n_all * n_chunks;
    p.n_all = n_all, p.n_chunks = n_chunks;
    p.codes = (const u8*)w;
    i64 twos = plane_end(0, n * (WORD_BYTES + BYTE_BYTES + NIBBLE_BYTES));
    i64 ones = plane_end(twos, n * TWO_BYTES);
    i64 scales = plane_end(ones, n * ONE_BYTES);
    i64 more = plane_end(scales, n / BLOCK_CHUNKS * SCALE_BYTES);
    p.twos = p.codes + twos, p.ones = p.codes + ones, p.scales = p.codes + scales, p.more = p.codes + more;
    return p;
}

// Of a row: its tile, its place there, and how many rows the tile has.
struct Row {
    i64 tile;
    int at, height;
};

DEVICE Row row_of(const Planes& p, i64 row) {
    Row r;
    r.tile = row / TILE, r.at = (int)(row % TILE);
    i64 left = p.n_all - r.tile * TILE;
    r.height = left < TILE ? (int)left : TILE;
    return r;
}

DEVICE int chunks_of(const Planes& p, i64 group) {
    i64 left = p.n_chunks - group * GROUP;
    return left < GROUP ? (int)left : GROUP;
}

// Where the units of a row's group begin in a plane with so many bytes a chunk.
DEVICE i64 group_at(const Planes& p, const Row& r, i64 group, int n_bytes) {
    return (r.tile * TILE * p.n_chunks + group * GROUP * r.height + (i64)r.at * chunks_of(p, group)) * n_bytes;
}

// Where the unit of thread t for a chunk lies in a plane of codes; a chunk has 4 * unit bytes there. A whole group of more than 16
// bytes a thread lies in pieces of 16: the first of all rows and threads, then the second, so that a warp reads what lies together.
DEVICE i64 unit_at(const Planes& p, const Row& r, i64 group, int chunk, int t, int unit) {
    int n = chunks_of(p, group);
    if (n < GROUP || unit < 8) return group_at(p, r, group, 4 * unit) + (t * n + chunk) * unit;
    i64 first = (r.tile * TILE * p.n_chunks + group * GROUP * r.height) * 4 * unit;
    return first + (chunk * unit / 16 * r.height * 4 + 4 * r.at + t) * 16 + chunk * unit % 16;
}

// Where what a block has in a plane of scales lies.
DEVICE i64 scale_at(const Planes& p, const Row& r, i64 chunk, int n_bytes) {
    if (SUPER) {
        i64 n_blocks = p.n_chunks / BLOCK_CHUNKS;
        return (r.tile * TILE * n_blocks + chunk / BLOCK_CHUNKS * r.height + r.at) * n_bytes;
    }
    return group_at(p, r, chunk / GROUP, n_bytes) + chunk % GROUP * n_bytes;
}

// -- scales ---------------------------------------------------------------------------------------------------------

// What a block's scales say of half a chunk: weight = scale * (code - ZERO) - min.
struct Scale {
    float scale, min;
};

DEVICE u16 word_at(const u8* at) { return (u16)(at[0] | at[1] << 8); }

#if CODES
// `scales` and `more` are what the planes hold of the block, `chunk` counts in the block, `half` is 0 or 1.
DEVICE Scale scale_of(const u8* scales, const u8* more, int chunk, int half) {
    Scale s;
    s.min = 0;
#if IS(Q4_0) || IS(Q5_0) || IS(Q8_0) || IS(IQ4_NL)
    s.scale = float_of_half(word_at(scales));
#elif IS(Q4_1) || IS(Q5_1)
    s.scale = float_of_half(word_at(scales));
    s.min = -float_of_half(word_at(scales + 2));
#elif IS(MXFP4)
    // half of 2^(e - 127), since the table holds twice the values
    s.scale = __uint_as_float(scales[0] < 2 ? 0x00200000u << scales[0] : (u32)(scales[0] - 1) << 23);
#elif IS(Q4_K) || IS(Q5_K)
    const u8* six = scales + 4;
    int n = chunk < 4 ? six[chunk] & 63 : (six[chunk + 4] & 15) | six[chunk - 4] >> 6 << 4;
    int m = chunk < 4 ? six[chunk + 4] & 63 : six[chunk + 4] >> 4 | six[chunk] >> 6 << 4;
    s.scale = float_of_half(word_at(scales)) * (float)n;
    s.min = float_of_half(word_at(scales + 2)) * (float)m;
#elif IS(Q6_K)
    s.scale = float_of_half(word_at(more)) * (float)(i8)scales[2 * chunk + half];
#elif IS(Q2_K)
    int n = scales[2 * chunk + half];
    s.scale = float_of_half(word_at(more)) * (float)(n & 15);
    s.min = float_of_half(word_at(more + 2)) * (float)(n >> 4);
#elif IS(Q3_K)
    int i = 2 * chunk + half;
    int n = (i < 8 ? scales[i] & 15 : scales[i - 8] >> 4) | (scales[8 + i % 4] >> 2 * (i / 4) & 3) << 4;
    s.scale = float_of_half(word_at(more)) * (float)(n - 32);
#elif IS(IQ4_XS)
    int n = (scales[4 + chunk / 2] >> 4 * (chunk % 2) & 15) | (word_at(scales + 2) >> 2 * chunk & 3) << 4;
    s.scale = float_of_half(word_at(scales)) * (float)(n - 32);
#endif
    return s;
}
#endif
