// One mistake a kernel: what the shim must notice.
#include "tensor_core.cuh"

extern "C" __global__ void reverse(const int *in, int *out) {  // no mistake: the others are made from it
    __shared__ int row[64];
    row[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void missing_barrier(const int *in, int *out) {
    __shared__ int row[64];
    row[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = row[63 - threadIdx.x];
}

extern "C" __global__ void shuffle_is_no_barrier(const int *in, int *out) {
    __shared__ int row[64];
    row[threadIdx.x] = in[threadIdx.x];
    __shfl_xor_sync(ALL_LANES, 0, 1);
    out[threadIdx.x] = row[threadIdx.x ^ 1];
}

extern "C" __global__ void blocks_share_a_sum(const int *in, int *out) { out[0] += in[threadIdx.x]; }

extern "C" __global__ void write_past_the_end(const int *in, int *out) { out[threadIdx.x + 1] = in[threadIdx.x]; }

extern "C" __global__ void read_before_the_start(const int *in, int *out) {
    out[threadIdx.x] = in[static_cast<int>(threadIdx.x) - 1];
}

extern "C" __global__ void shared_past_the_end(const int *in, int *out) {
    __shared__ int row[64];
    row[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = row[threadIdx.x + 1];
}

extern "C" __global__ void shared_past_the_end_by_pointer(const int *in, int *out) {
    __shared__ int row[64];
    int *pointer = row + threadIdx.x;
    *pointer = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = pointer[in[1]];
}

extern "C" __global__ void barrier_for_some(const int *in, int *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 40) __syncthreads();
}

extern "C" __global__ void shuffle_for_some(const int *in, int *out) {
    out[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x % 2) __shfl_xor_sync(ALL_LANES, 0, 1);
}

extern "C" __global__ void copy_not_waited_for(const int *in, int *out) {
    __shared__ __align__(16) int row[256];
    cp_async_16(row + 4 * threadIdx.x, in);
    cp_async_commit();
    __syncthreads();
    out[threadIdx.x] = row[4 * threadIdx.x];
}

extern "C" __global__ void copy_not_aligned(const int *in, int *out) {
    __shared__ __align__(16) int row[256];
    cp_async_16(row + 4 * threadIdx.x, in + 1);
    cp_async_wait<0>();
    out[threadIdx.x] = row[4 * threadIdx.x];
}

extern "C" __global__ void shared_never_written(const int *, int *out) {
    __shared__ float row[64];
    out[threadIdx.x] = row[threadIdx.x] == row[threadIdx.x];  // NaN is not
}

extern "C" __global__ void shift_too_far(const int *in, int *out) { out[threadIdx.x] = in[threadIdx.x] << (32 + in[0]); }
