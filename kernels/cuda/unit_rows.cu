// The queries of a match: raw taps [B, T, P, V] to rows of unit length, padded for match.cu.
//
// One warp a row, which it reads twice (the second time from L1): its peak and length, then the row itself.
// B = 1, 4 taps x 256 patches x 1280: 2.6 MB in (float16), 2.6 MB out (int8: 1.3 MB). Memory bound:
// Orin (204.8 GB/s) 26 us cold, H200 (4.8 TB/s) 1 us.
#include "device.cuh"

constexpr float COSINE_EPSILON = 1e-8f;  // torch's: a shorter vector counts as zero
constexpr float SMALLEST = 1e-30f;       // of a row's largest value: below, it counts as zero
constexpr float LARGEST = 3.402823466e38f;

/// What a row is multiplied by before it is stored, and its similarities afterwards.
struct RowScale {
    float before, after;
};

template <class Row> __device__ RowScale row_scale(float peak, float length);
template <> __device__ RowScale row_scale<__half>(float, float length) {
    return {1 / fmaxf(length, COSINE_EPSILON), 1.0f};
}
template <> __device__ RowScale row_scale<int8_t>(float peak, float length) {
    if (peak < SMALLEST) return {0.0f, 0.0f};
    return {127 / peak, peak / 127 / fmaxf(length, COSINE_EPSILON)};
}

__device__ void store(__half *to, float x) { *to = __float2half_rn(x); }
__device__ void store(int8_t *to, float x) { *to = static_cast<int8_t>(__float2int_rn(x)); }

/// Args:
///   features: [batch, taps, patches, width].
///   rows: [taps, padded_rows, padded_width]; row b * patches + p; zeros in the padding and where not finite.
///   inverse: [taps, padded_rows]: similarities are to be multiplied by it; NaN where a feature is not finite.
///   best: [taps, padded_rows], reset for match.cu.
/// Grid: a warp for each of taps * padded_rows rows.
template <class Feature, class Row>
__device__ void unit_rows(const Feature *__restrict__ features, Row *__restrict__ rows, float *__restrict__ inverse,
                          unsigned long long *__restrict__ best, int batch, int taps, int patches, int width,
                          int padded_rows, int padded_width) {
    int lane = threadIdx.x % WARP;
    int warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (warp >= taps * padded_rows) return;  // whole warps leave
    int tap = warp / padded_rows, row = warp % padded_rows;
    bool real = row < batch * patches;
    const Feature *from = features;
    if (real) from += (static_cast<size_t>(row / patches * taps + tap) * patches + row % patches) * width;
    float peak = 0, bad = 0;
    for (int i = lane; real && i < width; i += WARP) {
        float x = fabsf(to_float(from[i]));
        if (x <= LARGEST)
            peak = fmaxf(peak, x);
        else
            bad = 1;
    }
    peak = warp_max(peak);
    bad = warp_max(bad);
    float unit = peak < SMALLEST ? 0 : 1 / peak;  // squares of x / peak neither overflow nor vanish
    float squares = 0;
    for (int i = lane; real && i < width; i += WARP) {
        float x = to_float(from[i]) * unit;
        squares += x * x;
    }
    RowScale scale = row_scale<Row>(peak, peak * sqrtf(warp_sum(squares)));
    Row *to = rows + static_cast<size_t>(warp) * padded_width;
    for (int i = lane; i < padded_width; i += WARP)
        store(to + i, real && bad == 0 && i < width ? to_float(from[i]) * scale.before : 0.0f);
    if (lane == 0) {
        inverse[warp] = bad == 0 ? scale.after : __uint_as_float(0x7fc00000u);
        best[warp] = 0;
    }
}

#define UNIT_ROWS(name, Feature, Row)                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                              \
        name(const Feature *features, Row *rows, float *inverse, unsigned long long *best, int batch, int taps,    \
             int patches, int width, int padded_rows, int padded_width) {                                          \
        unit_rows(features, rows, inverse, best, batch, taps, patches, width, padded_rows, padded_width);          \
    }

UNIT_ROWS(unit_rows_f32_f16, float, __half)
UNIT_ROWS(unit_rows_f16_f16, __half, __half)
UNIT_ROWS(unit_rows_f32_i8, float, int8_t)
UNIT_ROWS(unit_rows_f16_i8, __half, int8_t)
