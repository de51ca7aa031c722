// Connected regions (8 neighbours) of a map at or above a level, in the order of their first pixel.
//
// Union-find over pixels: a label points to an earlier pixel of the same region, or to itself; atomicMin joins two
// roots, so that a region's root is its first pixel. (Playne and Hawick, "A new algorithm for parallel connected-component
// labelling on GPUs", IEEE TPDS 2018.) Roots are numbered by counting those in the blocks before; then every run of a
// row adds itself to its region's figures, so that a region costs atomics by runs, not by pixels.
// 224 x 224: 0.2 MB of map and 0.2 MB of labels from L2 in 5 launches: launches, 10 to 25 us on Orin, and the chains
// that the joining walks. 2 M pixels: 8 MB of each, five times: Orin 0.4 ms, H200 20 us.
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int PIXELS = 4;                  // of a thread where roots are counted
constexpr int CHUNK = THREADS * PIXELS;
constexpr int BELOW = -1;                  // label of a pixel below the level; of root k, once it has its number, -2 - k

struct Region {
    int first;                // pixel
    int left, right, bottom;  // the last two are one past
    int area;                 // pixels
    unsigned peak;            // ordered
};
static_assert(sizeof(Region) == 24, "stages.py reads it");

/// Labels change meanwhile, always to an earlier pixel: any of a label's values leads to the root.
__device__ int root_of(const int *labels, int pixel) {
    for (int next; (next = __ldcg(labels + pixel)) != pixel;) pixel = next;
    return pixel;
}

__device__ void unite(int *labels, int a, int b) {
    for (;;) {
        a = root_of(labels, a), b = root_of(labels, b);
        if (a == b) return;
        int later = max(a, b), earlier = min(a, b);
        int before = atomicMin(labels + later, earlier);
        if (before == later) return;  // it was a root until now
        a = before, b = earlier;      // another thread has joined it to `before`: that belongs here, too
    }
}

/// First. Grid: any number of blocks of 256 threads, which share the pixels.
extern "C" __global__ void __launch_bounds__(THREADS)
    components_begin(const float *__restrict__ map, int *__restrict__ labels, int size, float level) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += gridDim.x * THREADS)
        labels[i] = map[i] >= level ? i : BELOW;
}

/// Then. Grid: as above.
extern "C" __global__ void __launch_bounds__(THREADS) components_join(int *labels, int height, int width) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < height * width; i += gridDim.x * THREADS) {
        if (__ldcg(labels + i) == BELOW) continue;
        int x = i % width, above = i - width;
        bool left = x > 0, right = x + 1 < width;
        if (left && __ldcg(labels + i - 1) != BELOW) unite(labels, i, i - 1);
        if (above < 0) continue;
        if (__ldcg(labels + above) != BELOW) {  // joined with its own neighbours anyway
            unite(labels, i, above);
            continue;
        }
        if (left && __ldcg(labels + above - 1) != BELOW) unite(labels, i, above - 1);
        if (right && __ldcg(labels + above + 1) != BELOW) unite(labels, i, above + 1);
    }
}

__device__ int roots_of_thread(const int *labels, int size) {
    int first = blockIdx.x * CHUNK + threadIdx.x * PIXELS, found = 0;
    for (int i = first; i < min(first + PIXELS, size); i++) found += labels[i] == i;
    return found;
}

/// Then how many roots each chunk of 1,024 pixels has. Grid: a block for each chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
    components_count(const int *__restrict__ labels, int *__restrict__ counts, int size) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    if (int found = roots_of_thread(labels, size)) atomicAdd(&sum, found);
    __syncthreads();
    if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

/// Then their numbers. Grid: as above. Args: total: number of regions.
extern "C" __global__ void __launch_bounds__(THREADS)
    components_number(int *labels, const int *__restrict__ counts, Region *regions, int *total, int size, int width) {
    __shared__ int before, sums[2][THREADS];
    if (threadIdx.x == 0) before = 0;
    __syncthreads();
    int earlier = 0;
    for (int block = threadIdx.x; block < static_cast<int>(blockIdx.x); block += THREADS) earlier += counts[block];
    if (earlier) atomicAdd(&before, earlier);
    int own = roots_of_thread(labels, size), from = 0;
    sums[0][threadIdx.x] = own;
    for (int reach = 1; reach < THREADS; reach *= 2, from ^= 1) {  // sums of the threads up to this one, by doubling
        __syncthreads();
        int value = sums[from][threadIdx.x];
        if (static_cast<int>(threadIdx.x) >= reach) value += sums[from][threadIdx.x - reach];
        sums[from ^ 1][threadIdx.x] = value;
    }
    __syncthreads();
    int number = before + sums[from][threadIdx.x] - own, first = blockIdx.x * CHUNK + threadIdx.x * PIXELS;
    for (int i = first; i < min(first + PIXELS, size); i++) {
        if (labels[i] != i) continue;
        regions[number] = {i, width, 0, 0, 0, 0};
        labels[i] = -2 - number++;
    }
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == THREADS - 1) *total = number;
}

/// Last: what the runs of the rows add to their regions. Grid: as the first.
extern "C" __global__ void __launch_bounds__(THREADS)
    components_measure(const float *__restrict__ map, const int *__restrict__ labels, Region *regions, int height,
                       int width) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < height * width; i += gridDim.x * THREADS) {
        int x = i % width, y = i / width;
        if (labels[i] == BELOW || (x > 0 && labels[i - 1] != BELOW)) continue;
        int end = x, root = i;
        uint32_t peak = 0;
        for (; end < width && labels[i + end - x] != BELOW; end++) peak = max(peak, ordered(map[i + end - x]));
        while (labels[root] >= 0) root = labels[root];
        Region *region = regions + (-2 - labels[root]);
        atomicMin(&region->left, x);
        atomicMax(&region->right, end);
        atomicMax(&region->bottom, y + 1);
        atomicAdd(&region->area, end - x);
        atomicMax(&region->peak, peak);
    }
}
