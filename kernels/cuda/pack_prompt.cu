// A prompt's batch: rows of the language model's quantised embedding table, and rows made elsewhere, as float32.
//
// 100 positions of 4,096 values: 1.6 MB written, 0.2 MB (Q4_K) read. Orin 9 us of DRAM, H200 0.5 us: a launch.
// Bit for bit what ggml's dequantize_row_* give: float32 in the same order, products and sums rounded one by one.
// Block layouts: ggml project, ggml-common.h. Bytes are read singly: a row need not be aligned to anything.
#include "device.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ uint16_t word_at(const uint8_t *p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
__device__ __forceinline__ float half_at(const uint8_t *p) {
    __half_raw raw;
    raw.x = word_at(p);
    return __half2float(raw);
}
__device__ __forceinline__ int nibble(const uint8_t *packed, int i, int run) {  // low halves of a run, then high ones
    int byte = packed[i / (2 * run) * run + i % run];
    return i / run % 2 ? byte >> 4 : byte & 15;
}
__device__ __forceinline__ int bit(const uint8_t *packed, int i) { return packed[i / 8] >> i % 8 & 1; }
__device__ __forceinline__ float scaled(float scale, int x) { return __fmul_rn(scale, static_cast<float>(x)); }
__device__ __forceinline__ int signed_byte(uint8_t x) { return static_cast<int8_t>(x); }

struct F32 {
    static constexpr int values = 1, bytes = 4;
    static __device__ float at(const uint8_t *b, int) {
        return __uint_as_float(word_at(b) | static_cast<uint32_t>(word_at(b + 2)) << 16);
    }
};
struct F16 {
    static constexpr int values = 1, bytes = 2;
    static __device__ float at(const uint8_t *b, int) { return half_at(b); }
};
struct BF16 {
    static constexpr int values = 1, bytes = 2;
    static __device__ float at(const uint8_t *b, int) { return __uint_as_float(static_cast<uint32_t>(word_at(b)) << 16); }
};
struct Q8_0 {
    static constexpr int values = 32, bytes = 34;
    static __device__ float at(const uint8_t *b, int i) { return scaled(half_at(b), signed_byte(b[2 + i])); }
};
struct Q4_0 {
    static constexpr int values = 32, bytes = 18;
    static __device__ float at(const uint8_t *b, int i) { return scaled(half_at(b), nibble(b + 2, i, 16) - 8); }
};
struct Q4_1 {
    static constexpr int values = 32, bytes = 20;
    static __device__ float at(const uint8_t *b, int i) {
        return __fadd_rn(scaled(half_at(b), nibble(b + 4, i, 16)), half_at(b + 2));
    }
};
struct Q5_0 {
    static constexpr int values = 32, bytes = 22;
    static __device__ float at(const uint8_t *b, int i) {
        return scaled(half_at(b), (nibble(b + 6, i, 16) | bit(b + 2, i) << 4) - 16);
    }
};
struct Q5_1 {
    static constexpr int values = 32, bytes = 24;
    static __device__ float at(const uint8_t *b, int i) {
        return __fadd_rn(scaled(half_at(b), nibble(b + 8, i, 16) | bit(b + 4, i) << 4), half_at(b + 2));
    }
};

/// scale * x - minimum with the 6-bit scale and minimum of run `run` (of 8) of a K block.
__device__ __forceinline__ float k_value(const uint8_t *b, int run, int x) {
    const uint8_t *low = b + 4, *high = b + 8, *rest = b + 12;
    int i = run % 4;
    int scale = run < 4 ? low[i] & 63 : (rest[i] & 15) | (low[i] >> 2 & 48);
    int minimum = run < 4 ? high[i] & 63 : rest[i] >> 4 | (high[i] >> 2 & 48);
    return __fsub_rn(scaled(scaled(half_at(b), scale), x), scaled(half_at(b + 2), minimum));
}
struct Q4_K {
    static constexpr int values = 256, bytes = 144;
    static __device__ float at(const uint8_t *b, int i) { return k_value(b, i / 32, nibble(b + 16, i, 32)); }
};
struct Q5_K {
    static constexpr int values = 256, bytes = 176;
    static __device__ float at(const uint8_t *b, int i) {
        return k_value(b, i / 32, nibble(b + 48, i, 32) | (b[16 + i % 32] >> i / 32 & 1) << 4);
    }
};
struct Q6_K {  // two halves of 128 values: low nibbles of 64 bytes, two more bits each from 32 others
    static constexpr int values = 256, bytes = 210;
    static __device__ float at(const uint8_t *b, int i) {
        int low = nibble(b, i, 64), high = b[128 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
        return scaled(scaled(half_at(b + 208), signed_byte(b[192 + i / 16])), (low | high << 4) - 32);
    }
};

/// Args:
///   table: rows of `row_stride` bytes; sources: [gridDim.x]: a row of the table, or -1 - a row of `injected`.
///   injected: [rows, width]; out: [gridDim.x, width].
/// Grid: a block of 256 threads for each row of the batch.
template <class Type>
__device__ void pack_prompt(const uint8_t *__restrict__ table, const int *__restrict__ sources,
                            const float *__restrict__ injected, float *__restrict__ out, long long row_stride, int width) {
    int source = sources[blockIdx.x];
    out += static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += THREADS)
        out[i] = source < 0 ? injected[static_cast<size_t>(-1 - source) * width + i]
                            : Type::at(table + source * row_stride + i / Type::values * Type::bytes, i % Type::values);
}

#define PACK_PROMPT(Type)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        pack_prompt_##Type(const uint8_t *table, const int *sources, const float *injected, float *out,         \
                           long long row_stride, int width) {                                                   \
        pack_prompt<Type>(table, sources, injected, out, row_stride, width);                                    \
    }

PACK_PROMPT(F32)
PACK_PROMPT(F16)
PACK_PROMPT(BF16)
PACK_PROMPT(Q8_0)
PACK_PROMPT(Q4_0)
PACK_PROMPT(Q4_1)
PACK_PROMPT(Q5_0)
PACK_PROMPT(Q5_1)
PACK_PROMPT(Q4_K)
PACK_PROMPT(Q5_K)
PACK_PROMPT(Q6_K)
