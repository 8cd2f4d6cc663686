// Weights between GGUF's layout and planes. A thread moves one block.

// The block that a thread moves, where it lies in both layouts; false where there is none.
struct Moved {
    i64 raw, block;
    Row row;
};

DEVICE bool moved(const Planes& p, i64 raw, i64 first, i64 n, Moved& m) {
    i64 n_blocks = p.n_chunks / BLOCK_CHUNKS;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_blocks) return false;
    m.raw = raw + i * BLOCK_BYTES;
    m.block = i % n_blocks;
    m.row = row_of(p, first + i / n_blocks);
    return true;
}

// The units of eight codes: of pairs i the first in bits i * width on, the second half a unit higher.
DEVICE u32 unit_of(const int (&code)[8], int shift, int width) {
    u32 unit = 0, mask = (1u << width) - 1;
    for (int i = 0; i < 4; i++) {
        unit |= ((u32)code[2 * i] >> shift & mask) << i * width;
        unit |= ((u32)code[2 * i + 1] >> shift & mask) << (i + 4) * width;
    }
    return unit;
}

DEVICE void codes_of(u32 unit, int (&code)[8], int shift, int width) {
    u32 mask = (1u << width) - 1;
    for (int i = 0; i < 4; i++) {
        code[2 * i] |= (int)((unit >> i * width & mask) << shift);
        code[2 * i + 1] |= (int)((unit >> (i + 4) * width & mask) << shift);
    }
}

#define HIGH_SHIFT (NIBBLE_BYTES ? 4 : 0)
#define TOP_SHIFT (NIBBLE_BYTES ? 4 : 2)

KERNEL(128) pack(Pack a) {
    begin();
    Planes p = planes_of(a.packed, a.n_rows, a.k);
    Moved m;
    if (!moved(p, a.raw, a.first, a.n, m)) return;
    const u8* block = (const u8*)m.raw;
    for (int c = 0; c < BLOCK_CHUNKS; c++) {
        i64 chunk = m.block * BLOCK_CHUNKS + c, group = chunk / GROUP;
        for (int t = 0; t < 4; t++) {
            int place = (int)(chunk % GROUP);
#if CODES
            int code[8];
            for (int i = 0; i < 8; i++) code[i] = block_code(block, 32 * c + 8 * t + i);
            if (BYTE_BYTES)
                for (int i = 0; i < 8; i++) ((u8*)p.codes)[unit_at(p, m.row, group, place, t, 8) + i] = (u8)code[i];
            if (NIBBLE_BYTES) *(u32*)(p.codes + unit_at(p, m.row, group, place, t, 4)) = unit_of(code, 0, 4);
            if (TWO_BYTES) *(u16*)(p.twos + unit_at(p, m.row, group, place, t, 2)) = (u16)unit_of(code, HIGH_SHIFT, 2);
            if (ONE_BYTES) *(u8*)(p.ones + unit_at(p, m.row, group, place, t, 1)) = (u8)unit_of(code, TOP_SHIFT, 1);
#else
            u16* unit = (u16*)(p.codes + unit_at(p, m.row, group, place, t, 16));
            for (int i = 0; i < 8; i++) unit[i] = word_at(block + 2 * (8 * t + i));
#endif
        }
    }
    i64 first = m.block * BLOCK_CHUNKS;
    for (int i = 0; i < SCALE_BYTES; i++) ((u8*)p.scales)[scale_at(p, m.row, first, SCALE_BYTES) + i] = block[SCALE_AT + i];
    for (int i = 0; i < MORE_BYTES; i++) ((u8*)p.more)[scale_at(p, m.row, first, MORE_BYTES) + i] = block[MORE_AT + i];
}

KERNEL(128) unpack(Unpack a) {
    begin();
    Planes p = planes_of(a.packed, a.n_rows, a.k);
    Moved m;
    if (!moved(p, a.raw, a.first, a.n, m)) return;
    u8* block = (u8*)m.raw;
    for (int i = 0; i < BLOCK_BYTES; i++) block[i] = 0;
    for (int c = 0; c < BLOCK_CHUNKS; c++) {
        i64 chunk = m.block * BLOCK_CHUNKS + c, group = chunk / GROUP;
        for (int t = 0; t < 4; t++) {
            int place = (int)(chunk % GROUP);
#if CODES
            int code[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            if (BYTE_BYTES)
                for (int i = 0; i < 8; i++) code[i] = p.codes[unit_at(p, m.row, group, place, t, 8) + i];
            if (NIBBLE_BYTES) codes_of(*(const u32*)(p.codes + unit_at(p, m.row, group, place, t, 4)), code, 0, 4);
            if (TWO_BYTES) codes_of(*(const u16*)(p.twos + unit_at(p, m.row, group, place, t, 2)), code, HIGH_SHIFT, 2);
            if (ONE_BYTES) codes_of(p.ones[unit_at(p, m.row, group, place, t, 1)], code, TOP_SHIFT, 1);
            for (int i = 0; i < 8; i++) put_block_code(block, 32 * c + 8 * t + i, code[i]);
#else
            const u16* unit = (const u16*)(p.codes + unit_at(p, m.row, group, place, t, 16));
            for (int i = 0; i < 8; i++) {
                block[2 * (8 * t + i)] = (u8)unit[i];
                block[2 * (8 * t + i) + 1] = (u8)(unit[i] >> 8);
            }
#endif
        }
    }
    i64 first = m.block * BLOCK_CHUNKS;
    for (int i = 0; i < SCALE_BYTES; i++) block[SCALE_AT + i] = p.scales[scale_at(p, m.row, first, SCALE_BYTES) + i];
    for (int i = 0; i < MORE_BYTES; i++) block[MORE_AT + i] = p.more[scale_at(p, m.row, first, MORE_BYTES) + i];
}
