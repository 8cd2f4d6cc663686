// What kernels share: sums in a fixed order, rows by strides, what is wrong with an index.

#define WARP 32
#define ALL_LANES 0xffffffffu

// The node whose data points outside what it names; of several the first.
DEVICE void report(i64 status, i64 node) { atomicMin((u32*)status, (u32)node); }

DEVICE float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

DEVICE float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over a block of at most 1024 threads, for all of them. `room`: 32 floats of shared memory.
DEVICE float block_sum(float x, float* room) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    x = threadIdx.x % WARP < blockDim.x / WARP ? room[threadIdx.x % WARP] : 0.0f;
    return warp_sum(x);
}

// The same of the largest.
DEVICE float block_max(float x, float* room) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    x = threadIdx.x % WARP < blockDim.x / WARP ? room[threadIdx.x % WARP] : -INFINITE;
    return warp_max(x);
}
