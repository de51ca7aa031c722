// The same place of other images: for each patch of a normal image the nearest of a part's patches around that place.
//
// 4 normal images, 2 taps x 784 patches x 64, radius 2: 20 MFLOP, 1.6 MB of references. A warp walks over the window of
// a patch of a reference; a dot product of 2 products a lane and 5 shuffles takes about 35 instructions. 6,272 patches x
// 25 of them are 5.5 M instructions of warps: Orin (64 a cycle at 1.3 GHz) 66 us; H200 (528 at 1.7 GHz) 6 us.
#include "device.cuh"

constexpr float COSINE_EPSILON = 1e-8f;  // torch's: a shorter vector counts as zero
constexpr float LARGEST = 3.402823466e38f;

/// inverse: [rows], 1 / length of each row of `features` [rows, width]; NaN where a feature is not finite.
/// Grid: a warp a row.
template <class Feature>
__device__ void place_lengths(const Feature *__restrict__ features, float *__restrict__ inverse, int rows, int width) {
    int lane = threadIdx.x % WARP;
    int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;  // whole warps leave
    features += static_cast<size_t>(row) * width;
    float peak = 0, bad = 0;
    for (int i = lane; i < width; i += WARP) {
        float x = fabsf(to_float(features[i]));
        if (x <= LARGEST)
            peak = fmaxf(peak, x);
        else
            bad = 1;
    }
    peak = warp_max(peak);
    bad = warp_max(bad);
    float unit = peak < 1e-30f ? 0 : 1 / peak;  // squares of x / peak neither overflow nor vanish
    float squares = 0;
    for (int i = lane; i < width; i += WARP) {
        float x = bad == 0 ? to_float(features[i]) * unit : 0.0f;
        squares += x * x;
    }
    float length = peak * sqrtf(warp_sum(squares));
    if (lane == 0) inverse[row] = bad == 0 ? 1 / fmaxf(length, COSINE_EPSILON) : __uint_as_float(0x7fc00000u);
}

/// Args:
///   features: [batch, taps, side * side, width], inverse: [batch, taps, side * side].
///   reference: [count, taps, side * side, width] of unit length.
///   out: [batch, count, taps, side * side].
/// Grid: (a warp for each of batch * taps * side * side places, count).
template <class Feature>
__device__ void match_places(const Feature *__restrict__ features, const float *__restrict__ inverse,
                             const float *__restrict__ reference, float *__restrict__ out, int batch, int count,
                             int taps, int side, int width, int radius) {
    int lane = threadIdx.x % WARP, patches = side * side;
    int warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (warp >= batch * taps * patches) return;  // whole warps leave
    int plane = warp / patches, place = warp % patches, image = plane / taps, tap = plane % taps;
    int y = place / side, x = place % side;
    int top = max(y - radius, 0), bottom = min(y + radius, side - 1);
    int left = max(x - radius, 0), right = min(x + radius, side - 1);
    features += static_cast<size_t>(plane) * patches * width;
    inverse += static_cast<size_t>(plane) * patches;
    int index = blockIdx.y;
    reference += ((static_cast<size_t>(index) * taps + tap) * patches + place) * width;
    float best = -INFINITY, bad = 0;
    for (int v = top; v <= bottom; v++)
        for (int u = left; u <= right; u++) {
            const Feature *patch = features + static_cast<size_t>(v * side + u) * width;
            float scale = inverse[v * side + u], sum = 0;
            for (int i = lane; i < width; i += WARP) sum += to_float(patch[i]) * scale * reference[i];
            best = fmaxf(best, warp_sum(sum));
            if (scale != scale) bad = scale;  // NaN, which fmaxf drops
        }
    if (lane == 0)
        out[((static_cast<size_t>(image) * count + index) * taps + tap) * patches + place] = 1 - best + bad;
}

#define MATCH_PLACES(type, Feature)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        place_lengths_##type(const Feature *features, float *inverse, int rows, int width) {                           \
        place_lengths(features, inverse, rows, width);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        match_places_##type(const Feature *features, const float *inverse, const float *reference, float *out,         \
                            int batch, int count, int taps, int side, int width, int radius) {                         \
        match_places(features, inverse, reference, out, batch, count, taps, side, width, radius);                      \
    }

MATCH_PLACES(f32, float)
MATCH_PLACES(f16, __half)
