// What this GPU's tensor cores do at most: products of registers, nothing loaded. The ceiling of match.cu.
//
// Eight independent sums a warp hide the latency of an mma; 8 warps a block, blocks enough for every multiprocessor.
#include "tensor_core.cuh"

constexpr int SUMS = 8;

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_s8(c, a, b); }

template <class Sum> __device__ void multiply_registers(Sum *out, int steps) {
    Sum sums[SUMS][4] = {};
    uint32_t a[4] = {threadIdx.x, threadIdx.x, 0, 0}, b[2] = {threadIdx.x, 0};
    for (int step = 0; step < steps; step++)
#pragma unroll
        for (int i = 0; i < SUMS; i++)
            multiply(sums[i], a, b);
    Sum total = 0;
#pragma unroll
    for (int i = 0; i < SUMS; i++) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

/// out: [blocks * 256]. FLOP: blocks * 8 warps * steps * 8 * 2 * 16 * 8 * 16 (int8: 32).
extern "C" __global__ void __launch_bounds__(256) ceiling_f16(float *out, int steps) { multiply_registers(out, steps); }
extern "C" __global__ void __launch_bounds__(256) ceiling_i8(int *out, int steps) { multiply_registers(out, steps); }
