// Indices of the largest elements, and those that sort rows. What is ordered are keys of 64 bits, the least first: the order of
// the element in the high 32, its index in the low ones, so no two are equal. Sizes are those of row_launches.

#define SORTED 4096
#define TOP_PART 4096
#define PART_ROOM 256
#define MAX_PARTS 1024
#define N_BINS 2048
#define BIN_SHIFT 21
#define MOST ~0ull

// As unsigned numbers, in the order of floats; -0 is 0.
DEVICE u32 ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float element(const char* row, const i64 (&nb)[4], i64 i) { return *(const float*)(row + i * nb[0]); }

// What is no number is behind all others.
DEVICE u64 key_of(float x, i64 i, bool descending) {
    u32 order = x != x ? 0xffffffffu : descending ? ~ordered(x) : ordered(x);
    return (u64)order << 32 | (u32)i;
}

// -- the first largest ----------------------------------------------------------------------------------------------

DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// For the first thread.
DEVICE u64 block_largest(u64 key, u64* room) {
    for (int step = 16; step; step /= 2) key = larger(key, __shfl_xor_sync(ALL_LANES, key, step));
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = key;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < blockDim.x / WARP; w++) key = larger(key, room[w]);
    return key;
}

DEVICE i32 index_of(u64 key) { return (i32)(0xffffffffu - (u32)key); }

// What is no number is the largest, as it is for NumPy; of equals the first.
KERNEL(1024) argmax(ArgMax a) {
    begin();
    __shared__ u64 room[WARP];
    u32 r = blockIdx.x, part = blockIdx.y;
    const char* x = (const char*)a.x + row_offset(r, a.ne, a.x_nb);
    i64 each = (a.ne[0] + a.n_parts - 1) / a.n_parts, first = part * each, end = first + each < a.ne[0] ? first + each : a.ne[0];
    u64 key = 0;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) {
        float v = element(x, a.x_nb, i);
        key = larger(key, (u64)(v != v ? 0xffffffffu : ordered(v)) << 32 | (0xffffffffu - (u32)i));
    }
    key = block_largest(key, room);
    if (threadIdx.x) return;
    if (a.n_parts == 1) *(i32*)((char*)a.y + r * a.y_nb[0]) = index_of(key);
    else ((u64*)a.parts)[r * a.n_parts + part] = key;
}

KERNEL(1024) argmax_parts(ArgMaxParts a) {
    begin();
    __shared__ u64 room[WARP];
    u32 r = blockIdx.x;
    u64 key = 0;
    for (i64 i = threadIdx.x; i < a.n_parts; i += blockDim.x) key = larger(key, ((const u64*)a.parts)[r * a.n_parts + i]);
    key = block_largest(key, room);
    if (threadIdx.x == 0) *(i32*)((char*)a.y + r * a.y_nb[0]) = index_of(key);
}

// -- sorts ----------------------------------------------------------------------------------------------------------

// Keys in shared memory, a power of two of them: a bitonic sort.
DEVICE void sort_keys(u64* keys, int n) {
    for (int size = 2; size <= n; size *= 2) {
        for (int half = size / 2; half; half /= 2) {
            __syncthreads();
            for (int p = threadIdx.x; p < n / 2; p += blockDim.x) {
                int i = 2 * p - (p & (half - 1));
                u64 low = keys[i], high = keys[i + half];
                if ((low > high) == !(i & size)) keys[i] = high, keys[i + half] = low;
            }
        }
    }
    __syncthreads();
}

DEVICE int padded(i64 n) {
    int size = 1;
    while (size < n) size *= 2;
    return size;
}

// ggml's own order of the largest, which it calls unspecified: the first two change places.
DEVICE i64 place_of(i64 i, i64 k, bool swaps) { return swaps && k > 1 && i < 2 ? 1 - i : i; }

KERNEL(1024) sort(Sort a) {
    begin();
    __shared__ u64 keys[SORTED];
    u32 r = blockIdx.x;
    i64 first = (i64)blockIdx.y * SORTED, n = a.ne[0] - first < SORTED ? a.ne[0] - first : SORTED;
    const char* x = (const char*)a.x + row_offset(r, a.ne, a.x_nb);
    int size = padded(n);
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        keys[i] = i < n ? key_of(element(x, a.x_nb, first + i), first + i, a.descending) : MOST;
    sort_keys(keys, size);
    if (a.keys) {
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) ((u64*)a.keys)[r * a.ne[0] + first + i] = keys[i];
        return;
    }
    char* y = (char*)a.y + row_offset(r, a.ne, a.y_nb);
    for (i64 i = threadIdx.x; i < a.k; i += blockDim.x) *(i32*)(y + place_of(i, a.k, a.swaps) * a.y_nb[0]) = (i32)(u32)keys[i];
}

// Each key's place in the merged run: how many of its own run are before it, and how many of the other.
KERNEL(256) merge(Merge a) {
    begin();
    i64 t = thread_index();
    if (t >= a.n * a.n_rows) return;
    i64 row = t / a.n, i = t - row * a.n, run = i / a.run, begin = run * a.run, other = (run ^ 1) * a.run;
    const u64* x = (const u64*)a.x + row * a.n;
    u64 key = x[i];
    i64 low = other < a.n ? other : a.n, high = other + a.run < a.n ? other + a.run : a.n, first = low;
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (x[middle] < key) low = middle + 1;
        else high = middle;
    }
    ((u64*)a.y)[row * a.n + (begin < other ? begin : other) + (i - begin) + (low - first)] = key;
}

KERNEL(256) take(Take a) {
    begin();
    u32 r = blockIdx.x;
    i64 i = (i64)blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= a.k) return;
    i32 index = (i32)(u32)((const u64*)a.keys)[r * a.ne[0] + i];
    *(i32*)((char*)a.y + row_offset(r, a.ne, a.y_nb) + place_of(i, a.k, a.swaps) * a.y_nb[0]) = index;
}

// -- the k largest of many ------------------------------------------------------------------------------------------

// Keys are counted by their first 11 bits. Each part of the row gives those that are in the k-th key's bin or before; where these
// are too many for their room, the k-th key is looked for bit by bit. The least of what was found are then sorted.

struct Room {
    u32 *bins, *last, *counts;  // how many keys are in each bin, the k-th key's bin and how many are before it, keys of each part
    u64* kept;                  // PART_ROOM for each part
};

DEVICE Room room_of(i64 address, i64 n, u32 r) {
    i64 n_parts = (n + TOP_PART - 1) / TOP_PART, words = N_BINS + 2 + n_parts + n_parts % 2;
    u32* at = (u32*)(address + r * (4 * words + 8 * PART_ROOM * n_parts));
    return {at, at + N_BINS, at + N_BINS + 2, (u64*)(at + words)};
}

DEVICE u32 bin_of(u64 key) { return (u32)(key >> (32 + BIN_SHIFT)); }

KERNEL(256) top_clear(TopClear a) {
    begin();
    Room room = room_of(a.room, a.ne[0], blockIdx.x);
    for (int i = threadIdx.x; i < N_BINS; i += blockDim.x) room.bins[i] = 0;
}

KERNEL(256) top_count(TopCount a) {
    begin();
    __shared__ u32 bins[N_BINS];
    Room room = room_of(a.room, a.ne[0], blockIdx.x);
    const char* x = (const char*)a.x + row_offset(blockIdx.x, a.ne, a.x_nb);
    i64 first = (i64)blockIdx.y * TOP_PART, end = first + TOP_PART < a.ne[0] ? first + TOP_PART : a.ne[0];
    for (int i = threadIdx.x; i < N_BINS; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x)
        atomicAdd(&bins[bin_of(key_of(element(x, a.x_nb, i), i, true))], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < N_BINS; i += blockDim.x)
        if (bins[i]) atomicAdd(&room.bins[i], bins[i]);
}

// The bin of the k-th key and how many keys are before it, for a block of 256 threads; each has eight bins.
DEVICE void find_last(const u32* bins, i64 k, u32* sums, u32* found) {
    u32 own = 0;
    for (int i = 0; i < N_BINS / 256; i++) own += bins[threadIdx.x * (N_BINS / 256) + i];
    sums[threadIdx.x] = own;
    for (int step = 1; step < 256; step *= 2) {
        __syncthreads();
        u32 left = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
        __syncthreads();
        sums[threadIdx.x] += left;
    }
    u32 before = sums[threadIdx.x] - own;
    if (before < k && k <= before + own) {
        int bin = threadIdx.x * (N_BINS / 256);
        while (before + bins[bin] < k) before += bins[bin++];
        found[0] = bin, found[1] = before;
    }
    __syncthreads();
}

KERNEL(256) top_gather(TopGather a) {
    begin();
    __shared__ u32 sums[256], found[2], of_warps[8];
    Room room = room_of(a.room, a.ne[0], blockIdx.x);
    find_last(room.bins, a.k, sums, found);
    const char* x = (const char*)a.x + row_offset(blockIdx.x, a.ne, a.x_nb);
    i64 first = (i64)blockIdx.y * TOP_PART;
    u64* kept = room.kept + (i64)blockIdx.y * PART_ROOM;
    u32 n = 0, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (i64 i = first + threadIdx.x; i < first + TOP_PART + threadIdx.x; i += 256) {
        u64 key = i < a.ne[0] ? key_of(element(x, a.x_nb, i), i, true) : MOST;
        bool in = i < a.ne[0] && bin_of(key) <= found[0];
        u32 lanes = __ballot_sync(ALL_LANES, in);
        if (lane == 0) of_warps[warp] = __popc(lanes);
        __syncthreads();
        u32 at = n + __popc(lanes & ((1u << lane) - 1));
        for (u32 w = 0; w < 8; w++) {
            if (w < warp) at += of_warps[w];
            n += of_warps[w];
        }
        if (in && at < PART_ROOM) kept[at] = key;
        __syncthreads();
    }
    if (threadIdx.x) return;
    room.counts[blockIdx.y] = n;
    if (blockIdx.y == 0) room.last[0] = found[0], room.last[1] = found[1];
}

// Calls f(key) for the thread's keys of a row.
template <class F>
DEVICE void each_key(const char* x, const TopFinish& a, F f) {
    for (i64 i = threadIdx.x; i < a.ne[0]; i += blockDim.x) f(key_of(element(x, a.x_nb, i), i, true));
}

// The m-th least key of those in a bin: eight bits after eight bits.
DEVICE u64 nth_in_bin(const char* x, const TopFinish& a, u32 bin, u32 m, u32* counts, u64* found) {
    u64 prefix = (u64)bin << (32 + BIN_SHIFT);
    int above = 32 + BIN_SHIFT;
    while (above) {
        int shift = above > 8 ? above - 8 : 0;
        if (threadIdx.x < 256) counts[threadIdx.x] = 0;
        __syncthreads();
        each_key(x, a, [&](u64 key) {
            if (key >> above == prefix >> above) atomicAdd(&counts[(key ^ prefix) >> shift], 1u);
        });
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 digit = 0;
            while (counts[digit] < m) m -= counts[digit++];
            found[0] = prefix | (u64)digit << shift, found[1] = m;
        }
        __syncthreads();
        prefix = found[0], m = (u32)found[1];
        above = shift;
    }
    return prefix;
}

KERNEL(1024) top_finish(TopFinish a) {
    begin();
    __shared__ u64 keys[SORTED], found[2];
    __shared__ u32 counts[256], ends[MAX_PARTS];
    __shared__ u32 n_kept, n_taken;
    u32 r = blockIdx.x;
    Room room = room_of(a.room, a.ne[0], r);
    const char* x = (const char*)a.x + row_offset(r, a.ne, a.x_nb);
    int n_parts = (int)((a.ne[0] + TOP_PART - 1) / TOP_PART);
    for (int p = threadIdx.x; p < n_parts; p += blockDim.x) ends[p] = room.counts[p];
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 n = 0;
        for (int p = 0; p < n_parts; p++) {
            if (ends[p] > PART_ROOM) n = SORTED + 1;
            if (n <= SORTED) n += ends[p];
            ends[p] = n;
        }
        n_kept = n, n_taken = 0;
    }
    __syncthreads();
    bool fits = n_kept <= SORTED;
    int n = fits ? n_kept : (int)a.k, size = padded(n);
    for (int i = n + threadIdx.x; i < size; i += blockDim.x) keys[i] = MOST;
    if (fits) {
        for (int p = threadIdx.x / WARP; p < n_parts; p += blockDim.x / WARP) {
            int begin = p ? ends[p - 1] : 0;
            for (int i = begin + threadIdx.x % WARP; i < ends[p]; i += WARP) keys[i] = room.kept[(i64)p * PART_ROOM + i - begin];
        }
    } else {
        u64 last = nth_in_bin(x, a, room.last[0], (u32)a.k - room.last[1], counts, found);
        each_key(x, a, [&](u64 key) {
            if (key <= last) keys[atomicAdd(&n_taken, 1u)] = key;
        });
    }
    sort_keys(keys, size);
    char* y = (char*)a.y + row_offset(r, a.ne, a.y_nb);
    for (i64 i = threadIdx.x; i < a.k; i += blockDim.x) *(i32*)(y + place_of(i, a.k, true) * a.y_nb[0]) = (i32)(u32)keys[i];
}
