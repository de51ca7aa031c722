// Patches to maps: bilinear with aligned corners; zero-shot also the softmax of two classes and the mean of the taps.
//
// B = 1, 4 taps, 16 x 16 -> 224 x 224: 8 KB in, 200 KB out (100 KB in float16), 4 exponentials a pixel: 0.2 M.
// Orin: 1 us of DRAM, under 1 us of arithmetic; H200: less. A launch (2 to 5 us) costs more than the work.
// Each block first looks at all patches of its image (8 KB from L2): one that is not finite makes the whole map NaN.
#include "device.cuh"

constexpr int THREADS = 256;
constexpr float LARGEST = 3.402823466e38f;

/// Between patches `left` and `right` of rows `top` and `bottom`.
struct Corners {
    int left, right, top, bottom;
    float across, down;
};

__device__ Corners corners(int pixel, int size, int grid) {
    float step = size > 1 ? static_cast<float>(grid - 1) / static_cast<float>(size - 1) : 0.0f;
    float x = static_cast<float>(pixel % size) * step, y = static_cast<float>(pixel / size) * step;
    int left = min(static_cast<int>(x), grid - 1), top = min(static_cast<int>(y), grid - 1);
    return {left, min(left + 1, grid - 1), top, min(top + 1, grid - 1), x - static_cast<float>(left), y - static_cast<float>(top)};
}

/// Difference of the two classes' logits, or the plain value of one class.
template <int classes, class In> __device__ __forceinline__ float patch(const In *values, int index) {
    if constexpr (classes == 2) return to_float(values[2 * index + 1]) - to_float(values[2 * index]);
    return to_float(values[index]);
}

template <int classes, class In>
__device__ __forceinline__ float interpolate(const In *values, const Corners &c, int grid) {
    float above = patch<classes>(values, c.top * grid + c.left) * (1 - c.across) +
                  patch<classes>(values, c.top * grid + c.right) * c.across;
    float below = patch<classes>(values, c.bottom * grid + c.left) * (1 - c.across) +
                  patch<classes>(values, c.bottom * grid + c.right) * c.across;
    return above * (1 - c.down) + below * c.down;
}

/// Args: values: [gridDim.y, taps, grid * grid, classes]; out: [gridDim.y, size, size].
/// Grid: (any number of blocks that share an image's pixels, images), 256 threads.
template <int classes, class In, class Out>
__device__ void localise(const In *__restrict__ values, Out *__restrict__ out, int taps, int grid, int size) {
    int patches = grid * grid;
    values += static_cast<size_t>(blockIdx.y) * taps * patches * classes;
    int bad = 0;
    for (int i = threadIdx.x; i < taps * patches * classes; i += THREADS) bad |= !(fabsf(to_float(values[i])) <= LARGEST);
    bad = __syncthreads_or(bad);
    for (int pixel = blockIdx.x * THREADS + threadIdx.x; pixel < size * size; pixel += gridDim.x * THREADS) {
        Corners c = corners(pixel, size, grid);
        float total = 0;
        for (int tap = 0; tap < taps; tap++) {
            float value = interpolate<classes>(values + tap * patches * classes, c, grid);
            total += classes == 2 ? 1 / (1 + expf(-value)) : value;
        }
        float mean = bad ? __uint_as_float(0x7fc00000u) : total / static_cast<float>(taps);
        out[static_cast<size_t>(blockIdx.y) * size * size + pixel] = from_float<Out>(mean);
    }
}

#define LOCALISE(name, classes, In, Out)                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                            \
        name(const In *values, Out *out, int taps, int grid, int size) {             \
        localise<classes>(values, out, taps, grid, size);                            \
    }

LOCALISE(localise_f32_f32, 2, float, float)
LOCALISE(localise_f16_f32, 2, __half, float)
LOCALISE(localise_f16_f16, 2, __half, __half)
LOCALISE(upsample_f32_f32, 1, float, float)
LOCALISE(upsample_f32_f16, 1, float, __half)
