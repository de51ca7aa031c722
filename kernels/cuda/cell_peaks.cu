// The highest value in each cell of a map cut into cells x cells.
//
// 224 x 224, 3 x 3: 0.2 MB from L2, a block for each cell: a launch costs more than the work (2 to 5 us).
#include "device.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ int first_of_cell(int cell, int size, int cells) {
    if (cell == 0) return 0;
    return cell == cells ? size : static_cast<int>(static_cast<long long>(cell) * size / cells) + 1;
}

/// A NaN stays, whatever comes after it.
__device__ __forceinline__ float higher(float peak, float value) { return value > peak || value != value ? value : peak; }

/// Args: map: [height, width]; out: [gridDim.y, gridDim.x]. Grid: (cells, cells), 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS)
    cell_peaks(const float *__restrict__ map, float *__restrict__ out, int height, int width) {
    __shared__ float peaks[THREADS];
    int cells = gridDim.x, top = first_of_cell(blockIdx.y, height, cells), left = first_of_cell(blockIdx.x, width, cells);
    int rows = first_of_cell(blockIdx.y + 1, height, cells) - top;
    int columns = first_of_cell(blockIdx.x + 1, width, cells) - left;
    float peak = __uint_as_float(0xff800000u);  // -inf
    for (int y = threadIdx.x / WARP; y < rows; y += THREADS / WARP)
        for (int x = threadIdx.x % WARP; x < columns; x += WARP)
            peak = higher(peak, map[static_cast<size_t>(top + y) * width + left + x]);
    peaks[threadIdx.x] = peak;
    for (int reach = THREADS / 2; reach > 0; reach /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < reach)
            peaks[threadIdx.x] = higher(peaks[threadIdx.x], peaks[threadIdx.x + reach]);
    }
    if (threadIdx.x == 0) out[blockIdx.y * cells + blockIdx.x] = peaks[0];
}
