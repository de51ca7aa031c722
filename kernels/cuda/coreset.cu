// A greedy coreset: the row nearest to the mean first, then always the row that is least like those taken already.
//
// A pick is a pass over all rows: 4 taps x 100,000 x 1280 float32 are 2 GB. Orin: 10 ms a pick, H200: 0.45 ms; a
// launch a pick, and the next launch finds the pick where this one has left it.
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

typedef unsigned long long Key;  // the lowest is the pick: a float's bits in order, then the row

/// First. Grid: (any number of blocks, taps). Args: best: [taps, picks + 1].
extern "C" __global__ void __launch_bounds__(THREADS)
    coreset_begin(float *__restrict__ nearest, Key *__restrict__ best, int num_rows, int picks) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < num_rows; i += gridDim.x * THREADS)
        nearest[static_cast<size_t>(blockIdx.y) * num_rows + i] = __uint_as_float(0xff800000u);  // -inf
    for (int i = blockIdx.x * THREADS + threadIdx.x; i <= picks; i += gridDim.x * THREADS)
        best[static_cast<size_t>(blockIdx.y) * (picks + 1) + i] = ~0ull;
}

/// Then the mean row. Grid: (blocks for all columns, taps).
extern "C" __global__ void __launch_bounds__(THREADS)
    coreset_centre(const float *__restrict__ rows, float *__restrict__ centre, int num_rows, int width) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= width) return;
    rows += static_cast<size_t>(blockIdx.y) * num_rows * width;
    double sum = 0;
    for (int row = 0; row < num_rows; row++) sum += rows[static_cast<size_t>(row) * width + column];
    centre[blockIdx.y * width + column] = static_cast<float>(sum / num_rows);
}

/// A warp takes one row after the other and finds its dot product with `vector`; the block offers its best to `best`.
template <class Score>
__device__ void offer_best(const float *rows, const float *vector, Key *best, int num_rows, int width, Score score) {
    __shared__ Key keys[WARPS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Key key = ~0ull;
    for (int row = blockIdx.x * WARPS + warp; row < num_rows; row += gridDim.x * WARPS) {
        float sum = 0;
        for (int i = lane; i < width; i += WARP) sum += rows[static_cast<size_t>(row) * width + i] * vector[i];
        sum = warp_sum(sum);
        if (lane > 0) continue;
        Key own = static_cast<Key>(ordered(score(row, sum))) << 32 | static_cast<unsigned>(row);
        key = own < key ? own : key;
    }
    if (lane == 0) keys[warp] = key;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < WARPS; i++) key = keys[i] < key ? keys[i] : key;
    atomicMin(best, key);
}

/// Then the row most like the mean. Grid: (any number of blocks, taps).
extern "C" __global__ void __launch_bounds__(THREADS) coreset_first(
    const float *__restrict__ rows, const float *__restrict__ centre, Key *best, int num_rows, int width, int picks) {
    rows += static_cast<size_t>(blockIdx.y) * num_rows * width;
    best += static_cast<size_t>(blockIdx.y) * (picks + 1);
    offer_best(rows, centre + blockIdx.y * width, best, num_rows, width, [](int, float sum) { return -sum; });
}

/// Then, for step 0 to picks - 1, note the pick and find the next. Grid: as above.
extern "C" __global__ void __launch_bounds__(THREADS)
    coreset_next(const float *__restrict__ rows, float *__restrict__ nearest, Key *best, int *__restrict__ chosen,
                 int num_rows, int width, int picks, int step) {
    rows += static_cast<size_t>(blockIdx.y) * num_rows * width;
    nearest += static_cast<size_t>(blockIdx.y) * num_rows;
    best += static_cast<size_t>(blockIdx.y) * (picks + 1) + step;
    int pick = static_cast<int>(*best & 0xffffffffull);
    if (blockIdx.x == 0 && threadIdx.x == 0) chosen[blockIdx.y * picks + step] = pick;
    auto score = [=](int row, float sum) {
        float similarity = row == pick ? __uint_as_float(0x7f800000u) : fmaxf(nearest[row], sum);  // never twice
        return nearest[row] = similarity;
    };
    offer_best(rows, rows + static_cast<size_t>(pick) * width, best + 1, num_rows, width, score);
}
