// Figures of a map: peak, lowest, median, mean of the highest 1 %, exactly, whatever the map's size.
//
// Radix selection: a float's bits, ordered as unsigned integers, are fixed 8 at a time from the top; each pass counts
// in 256 bins how many values share the bits fixed so far, for three ranks at once (the last of the highest 1 %, and
// the two in the middle). 224 x 224: 0.2 MB from L2 in each of 6 launches: Orin about 6 x 5 us, mostly launches.
// 3840 x 2160: 33 MB five times: Orin 0.8 ms, H200 35 us. Values that crowd into one bin queue for its counter, one
// a clock and SM: 8.3 M / 16 SMs = 0.5 M clocks a rank at worst, 1.2 ms on Orin.
//
// The last block of a launch (a ticket tells which) closes it; sums of blocks are added in the blocks' order, so
// that equal maps give equal figures.
#include "device.cuh"

constexpr int THREADS = 256, BINS = 256;
constexpr int RANKS = 3;  // counted from the highest value, which is 0
constexpr int MAX_BLOCKS = 256;
constexpr float LARGEST = 3.402823466e38f;

struct State {
    unsigned ranks[RANKS];      // among the values that share `prefix`
    uint32_t prefix[RANKS];     // bits fixed so far
    uint32_t highest, lowest;   // ordered; `lowest` complemented
    unsigned broken, tickets;   // a value is not finite; blocks that are through
    unsigned histograms[RANKS][BINS];
    double sums[MAX_BLOCKS];    // of values above the first rank's, block by block
};
static_assert(sizeof(State) == 5160, "stages.py allocates it");

/// Whether this block is the last one through; what the others wrote before is visible to it.
__device__ bool is_last_block(State *state) {
    __shared__ unsigned ticket;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(&state->tickets, 1u);
    __syncthreads();
    bool last = ticket == gridDim.x - 1;
    if (last && threadIdx.x == 0) atomicExch(&state->tickets, 0u);
    __threadfence();
    return last;
}

/// For every rank the bin that holds it, found from the number of values in higher bins.
__device__ void narrow(State *state) {
    __shared__ unsigned above[2][BINS];
    int bin = threadIdx.x;
    for (int rank = 0; rank < RANKS; rank++) {
        unsigned own = atomicExch(&state->histograms[rank][bin], 0u), from = 0;
        __syncthreads();
        above[0][bin] = own;
        for (int reach = 1; reach < BINS; reach *= 2, from ^= 1) {  // suffix sums by doubling
            __syncthreads();
            above[from ^ 1][bin] = above[from][bin] + (bin + reach < BINS ? above[from][bin + reach] : 0);
        }
        __syncthreads();
        unsigned higher = above[from][bin] - own, wanted = state->ranks[rank];
        __syncthreads();  // all have read the rank that one changes
        if (higher <= wanted && wanted < higher + own) {
            state->prefix[rank] = state->prefix[rank] << 8 | bin;
            state->ranks[rank] = wanted - higher;
        }
    }
}

/// First: nothing counted yet. Grid: one block. Args: count: how many of the highest values the mean is of.
extern "C" __global__ void __launch_bounds__(THREADS) summarise_begin(State *state, int num_values, int count) {
    for (int rank = 0; rank < RANKS; rank++) state->histograms[rank][threadIdx.x] = 0;
    if (threadIdx.x > 0) return;
    unsigned ranks[RANKS] = {static_cast<unsigned>(count) - 1, static_cast<unsigned>(num_values) / 2,
                             (static_cast<unsigned>(num_values) - 1) / 2};
    for (int rank = 0; rank < RANKS; rank++) state->ranks[rank] = ranks[rank], state->prefix[rank] = 0;
    state->highest = state->lowest = 0;
    state->broken = state->tickets = 0;
}

/// Then pass 0, 1, 2, 3. Grid: at most 256 blocks of 256 threads, which share the values.
extern "C" __global__ void __launch_bounds__(THREADS)
    summarise_pass(const float *__restrict__ values, State *state, int num_values, int pass) {
    __shared__ unsigned histograms[RANKS][BINS];
    int shift = 24 - 8 * pass;
    uint32_t prefix[RANKS];
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
        prefix[rank] = state->prefix[rank];
        histograms[rank][threadIdx.x] = 0;
    }
    __syncthreads();
    uint32_t highest = 0, lowest = 0;
    unsigned broken = 0;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < num_values; i += gridDim.x * THREADS) {
        float value = values[i];
        uint32_t key = ordered(value);
        broken |= !(fabsf(value) <= LARGEST);
        highest = key > highest ? key : highest;
        lowest = ~key > lowest ? ~key : lowest;
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++)
            if (pass == 0 || key >> (shift + 8) == prefix[rank]) atomicAdd(&histograms[rank][key >> shift & 255], 1u);
    }
    if (pass == 0) {
        atomicMax(&state->highest, highest);
        atomicMax(&state->lowest, lowest);
        atomicMax(&state->broken, broken);
    }
    __syncthreads();
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++)
        if (unsigned count = histograms[rank][threadIdx.x]) atomicAdd(&state->histograms[rank][threadIdx.x], count);
    if (is_last_block(state)) narrow(state);
}

/// Last: peak, lowest, median, mean of the highest `count`; NaN when a value is not finite. Grid: as above.
extern "C" __global__ void __launch_bounds__(THREADS)
    summarise_figures(const float *__restrict__ values, State *state, float *figures, int num_values, int count) {
    __shared__ double sums[THREADS];
    uint32_t limit = state->prefix[0];
    double sum = 0;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < num_values; i += gridDim.x * THREADS)
        if (ordered(values[i]) > limit) sum += values[i];
    sums[threadIdx.x] = sum;
    for (int reach = THREADS / 2; reach > 0; reach /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < reach) sums[threadIdx.x] += sums[threadIdx.x + reach];
    }
    if (threadIdx.x == 0) state->sums[blockIdx.x] = sums[0];
    if (!is_last_block(state) || threadIdx.x > 0) return;
    double total = 0;
    for (unsigned block = 0; block < gridDim.x; block++) total += __ldcg(&state->sums[block]);
    int equal = static_cast<int>(state->ranks[0]) + 1;  // of the highest `count`, those equal to the lowest of them
    total += static_cast<double>(equal) * from_ordered(limit);
    float nan = __uint_as_float(0x7fc00000u);
    figures[0] = state->broken ? nan : from_ordered(state->highest);
    figures[1] = state->broken ? nan : from_ordered(~state->lowest);
    figures[2] = state->broken ? nan : 0.5f * from_ordered(state->prefix[1]) + 0.5f * from_ordered(state->prefix[2]);
    figures[3] = state->broken ? nan : static_cast<float>(total / count);
}
