// CUDA's device language on a CPU: enough of it to run kernels/cuda/*.cu, in place of nvcc's headers.
//
// Every CUDA thread of a block is a fibre (host_shim.cpp); blocks run one after another. A fibre runs until it
// meets the others: at a barrier, a shuffle, a vote, a matrix product. So
//   - buffers are heap blocks of the exact size asked for: AddressSanitizer stops at the first byte outside one,
//     and outside each __shared__ array;
//   - ThreadSanitizer knows every fibre as a thread of its own, ordered by barriers and by nothing else: it names
//     the two accesses of any data race, in shared or global memory, whatever order they ran in here;
//   - the order in which fibres run is an argument of the launch;
//   - shared memory is filled with NaNs before each block, cp.async copies when it is waited for and not before;
//   - a barrier or warp operation that some thread never reaches ends the launch with an error, not a hang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shim_shared")))
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
};
struct uint2 {
    uint32_t x, y;
};
struct __align__(16) uint4 {
    uint32_t x, y, z, w;
};

// What stands for registers and wires is not memory that threads share: ThreadSanitizer shall not look at it.
#define SHIM_UNWATCHED __attribute__((no_sanitize("thread")))

namespace shim {
constexpr int WARP = 32;
const dim3 &thread_idx();
const dim3 &block_idx();
const dim3 &block_dim();
const dim3 &grid_dim();
void barrier();
int barrier_or(int value);
void warp_barrier(uint32_t mask);
void check_aligned(const void *address, unsigned bytes);  // ends the program if it is not
/// Meets the other lanes of `mask`; the last to come runs `combine` over all lanes' `operands` (null: not in mask).
void warp_meet(uint32_t mask, void *operands, void (*combine)(void **lanes));
void async_copy(void *to, const void *from, int bytes);  // queued
void async_commit();
int async_ready(int newest_left);  // copies that a wait completes now
void async_take(void **to, const void **from, int *bytes);
}  // namespace shim

#define threadIdx (shim::thread_idx())
#define blockIdx (shim::block_idx())
#define blockDim (shim::block_dim())
#define gridDim (shim::grid_dim())

inline void __syncthreads() { shim::barrier(); }
inline int __syncthreads_or(int value) { return shim::barrier_or(value); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { shim::warp_barrier(mask); }

template <class T> T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
    struct Lane {
        T in, out;
        int lane_mask;
    } mine = {value, value, lane_mask};
    shim::warp_meet(mask, &mine, [](void **lanes) SHIM_UNWATCHED {
        for (int lane = 0; lane < shim::WARP; lane++)
            if (lanes[lane]) {
                auto *me = static_cast<Lane *>(lanes[lane]);
                auto *other = static_cast<Lane *>(lanes[lane ^ me->lane_mask]);
                if (other) me->out = other->in;
            }
    });
    return mine.out;
}

template <class T> T __ldg(const T *address) { return *address; }
template <class T> T __ldcg(const T *address) {  // from L2, where atomics work
    T value;
    __atomic_load(address, &value, __ATOMIC_RELAXED);
    return value;
}
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// Atomics order what comes before and after them, as the fences do that CUDA code needs beside them.
template <class T> T atomicAdd(T *address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL); }
template <class T> T atomicExch(T *address, T value) { return __atomic_exchange_n(address, value, __ATOMIC_ACQ_REL); }
template <class T> T atomicMax(T *address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    while (old < value &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    return old;
}
template <class T> T atomicMin(T *address, T value) {
    T old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    while (old > value &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    return old;
}
inline void __threadfence() {}

/// IEEE binary16 by its bits, rounded to nearest even as the hardware does.
struct __half_raw {
    uint16_t x;
};
struct __half {
    uint16_t bits;
    __half() = default;
    __half(__half_raw raw) : bits(raw.x) {}
};
inline float __half2float(__half h) {
    uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    float magnitude = exponent ? std::ldexp(float(fraction | 1024), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    return sign ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
    uint32_t bits = __float_as_uint(x);
    uint16_t sign = bits >> 16 & 0x8000;
    float magnitude = std::fabs(x);
    if (!(magnitude == magnitude)) return __half_raw{uint16_t(sign | 0x7fff)};
    if (magnitude >= 65520.0f) return __half_raw{uint16_t(sign | 0x7c00)};
    int exponent = -13;
    if (magnitude > 0) std::frexp(magnitude, &exponent);
    int unit = (exponent < -13 ? -13 : exponent) - 11;  // of the last place
    uint32_t steps = uint32_t(std::nearbyint(std::ldexp(magnitude, -unit)));
    // Subnormal: `steps` are the bits. Normal: the hidden bit in `steps` carries into the exponent.
    return __half_raw{uint16_t(sign | (unit == -24 && steps < 1024 ? steps : steps + (uint32_t(unit + 24) << 10)))};
}

// What kernels/cuda/tensor_core.cuh wraps in PTX on a GPU. Operands lie among the lanes as PTX ISA 9.7.14 says.
inline void cp_async_16(void *shared, const void *global) {
    shim::check_aligned(shared, 16);
    shim::check_aligned(global, 16);
    shim::async_copy(shared, global, 16);
}
inline void cp_async_commit() { shim::async_commit(); }
template <int newest_left> void cp_async_wait() {
    for (int n = shim::async_ready(newest_left); n > 0; n--) {
        void *to;
        const void *from;
        int bytes;
        shim::async_take(&to, &from, &bytes);
        std::memcpy(to, from, bytes);
    }
}

/// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 and receives, of
/// each matrix, elements 2 (l % 4) and the next one of row l / 4.
inline void ldmatrix_x4(uint32_t (&out)[4], const void *row) {
    struct Lane {
        uint32_t row[4], *out;
    } mine;
    shim::check_aligned(row, 16);
    std::memcpy(mine.row, row, 16);
    mine.out = out;
    shim::warp_meet(0xffffffffu, &mine, [](void **lanes) SHIM_UNWATCHED {
        for (int lane = 0; lane < shim::WARP; lane++)
            for (int matrix = 0; matrix < 4; matrix++)
                static_cast<Lane *>(lanes[lane])->out[matrix] =
                    static_cast<Lane *>(lanes[8 * matrix + lane / 4])->row[lane % 4];
    });
}

namespace shim {
template <class Element, class Sum> struct MmaLane {
    const uint32_t *a, *b;
    Sum *c;
};
inline float value(const __half &h) { return __half2float(h); }
inline int value(const int8_t &i) { return i; }

/// m16n8k(32 bytes): row.col, c += a b.
template <class Element, class Sum> void mma(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using Lane = MmaLane<Element, Sum>;
    Lane mine = {a, b, c};
    warp_meet(0xffffffffu, &mine, [](void **lanes) SHIM_UNWATCHED {
        constexpr int word = 4 / sizeof(Element), depth = 8 * word;
        decltype(value(Element())) a[16][depth], b[8][depth];
        for (int lane = 0; lane < WARP; lane++) {
            const Lane *from = static_cast<Lane *>(lanes[lane]);
            for (int part = 0; part < 4; part++)
                for (int k = 0; k < word; k++) {
                    int column = (part / 2) * 4 * word + lane % 4 * word + k;
                    Element element;
                    std::memcpy(&element, reinterpret_cast<const char *>(from->a + part) + k * sizeof element, sizeof element);
                    a[lane / 4 + part % 2 * 8][column] = value(element);
                    if (part % 2 == 0) {
                        std::memcpy(&element, reinterpret_cast<const char *>(from->b + part / 2) + k * sizeof element, sizeof element);
                        b[lane / 4][column] = value(element);
                    }
                }
        }
        for (int lane = 0; lane < WARP; lane++)
            for (int i = 0; i < 4; i++) {
                const auto *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
                Sum sum = static_cast<Lane *>(lanes[lane])->c[i];
                for (int k = 0; k < depth; k++) sum += row[k] * column[k];
                static_cast<Lane *>(lanes[lane])->c[i] = sum;
            }
    });
}
}  // namespace shim

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { shim::mma<__half>(c, a, b); }
inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { shim::mma<int8_t>(c, a, b); }
