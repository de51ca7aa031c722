// Nearest normal patch of every patch: a matrix product whose result is never written, only its row maxima.
//
// 4 taps x 256 patches x 1,024 bank rows x 1280: 2.7 GFLOP; the bank is 10.5 MB in float16, 5.2 MB in int8.
//                     tensor cores (dense peak)        bank from DRAM          so at best
//   AGX Orin, f16     42.5 TFLOP/s: 63 us              204.8 GB/s: 51 us       63 us
//   AGX Orin, int8    85 TOP/s: 32 us                  26 us                   32 us
//   H200, f16         989 TFLOP/s (mma.sync gets about 60 %): 5 us   4.8 TB/s: 2 us   5 us
// At 100,000 rows (262 GFLOP, 1 GB): Orin 6.2 ms against 5 ms of DRAM; the two row tiles of one image read the
// bank together, the second from L2.
//
// A block of 8 warps holds 128 queries x 128 bank rows of sums in registers (64 a thread, 64 x 32 a warp) and walks
// over the bank, 64 bytes of each row a step: three steps in flight (cp.async), 48 KB of shared memory. Intensity:
// 128 * 128 * 32 * 2 FLOP for 16 KB, 64 FLOP a byte out of L2.
// After the last step of a tile each thread folds its 64 sums into the maxima of its 8 rows, still in registers.
// Blocks over other parts of the bank meet in one atomicMax a row: the key holds value and place, so the result
// does not depend on the order, and of equal values the lowest row wins.
#include "tensor_core.cuh"

constexpr int TILE = 128;  // queries, and bank rows, of a block
constexpr int STEP = 64;   // bytes of a row at a time
constexpr int STAGES = 3;
constexpr int THREADS = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int BLOCKS_PER_SM = 1;  // Turing has 64 KB of shared memory
#else
constexpr int BLOCKS_PER_SM = 2;
#endif
constexpr int WARP_ROWS = 64, WARP_COLUMNS = 32;
constexpr int ROW_TILES = WARP_ROWS / 16, COLUMN_TILES = WARP_COLUMNS / 8;  // of one mma

/// Where 16-byte piece `piece` of a row lies in a stage: neighbouring rows are turned against each other, so that
/// the 8 rows that ldmatrix reads at once, and the 2 that 8 threads write, fall into different banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * STEP + ((piece ^ row >> 1) & 3) * 16; }

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(c, a, b);
}
__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8(c, a, b);
}

/// Sums are similarities themselves in float16; in int8 they count in the scale of the bank's row.
__device__ __forceinline__ float similarity(float sum, const float *, int) { return sum; }
__device__ __forceinline__ float similarity(int sum, const float *scales, int row) {
    return static_cast<float>(sum) * __ldg(scales + row);
}

/// One step's 64 bytes of 128 rows into a stage.
__device__ __forceinline__ void load_rows(uint8_t *stage, const uint8_t *rows, int row_bytes) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE * STEP / 16; i += THREADS)
        cp_async_16(stage + swizzled(i / 4, i % 4), rows + static_cast<size_t>(i / 4) * row_bytes + i % 4 * 16);
}

/// sums += queries bank^T over one step, for this warp's part of the tile.
template <class Sum>
__device__ __forceinline__ void multiply_step(Sum (&sums)[ROW_TILES][COLUMN_TILES][4], const uint8_t *queries,
                                              const uint8_t *bank, int first_row, int first_column) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int pieces = 0; pieces < STEP / 16; pieces += 2) {  // 32 bytes: the depth of one mma
        uint32_t b[COLUMN_TILES / 2][4];
#pragma unroll
        for (int j = 0; j < COLUMN_TILES / 2; j++)
            ldmatrix_x4(b[j], bank + swizzled(first_column + j * 16 + lane / 16 * 8 + lane % 8, pieces + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            uint32_t a[4];
            ldmatrix_x4(a, queries + swizzled(first_row + i * 16 + lane % 16, pieces + lane / 16));
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j++) {
                const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                multiply(sums[i][j], a, pair);
            }
        }
    }
}

/// Args:
///   queries: [taps, padded_queries, row_bytes], bank: [taps, padded_rows, row_bytes]: rows of unit length
///     (float16 or int8), zero padding; padded_* are multiples of 128, row_bytes of 64; pointers of 16.
///   scales: float [taps, padded_rows] (int8).
///   best: [taps, padded_queries], 0 before: ordered(similarity) << 32 | ~row.
/// Grid: (padded_queries / 128, parts of `tiles_per_block` * 128 bank rows, taps).
template <class Sum>
__device__ __forceinline__ void match(const uint8_t *__restrict__ queries, const uint8_t *__restrict__ bank,
                                      const float *__restrict__ scales, unsigned long long *__restrict__ best,
                                      int padded_queries, int num_rows, int padded_rows, int row_bytes,
                                      int tiles_per_block) {
    __shared__ __align__(128) uint8_t query_stages[STAGES][TILE * STEP];
    __shared__ __align__(128) uint8_t bank_stages[STAGES][TILE * STEP];

    int tap = blockIdx.z, first_query = blockIdx.x * TILE;
    int first_tile = blockIdx.y * tiles_per_block;
    int tiles = min(tiles_per_block, padded_rows / TILE - first_tile);
    int steps = tiles * (row_bytes / STEP);
    queries += (static_cast<size_t>(tap) * padded_queries + first_query) * row_bytes;
    bank += (static_cast<size_t>(tap) * padded_rows + first_tile * TILE) * row_bytes;
    scales += static_cast<size_t>(tap) * padded_rows;

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int first_row = warp / 4 * WARP_ROWS, first_column = warp % 4 * WARP_COLUMNS;
    Sum sums[ROW_TILES][COLUMN_TILES][4] = {};
    float nearest[ROW_TILES * 2];
    int place[ROW_TILES * 2];
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; i++) nearest[i] = -INFINITY, place[i] = 0;

    int byte = 0;  // of a row, and `bank` the tile, that are loaded next
    auto load = [&](int step) {
        if (step < steps) {
            load_rows(query_stages[step % STAGES], queries + byte, row_bytes);
            load_rows(bank_stages[step % STAGES], bank + byte, row_bytes);
            byte += STEP;
            if (byte == row_bytes) byte = 0, bank += static_cast<size_t>(TILE) * row_bytes;
        }
        cp_async_commit();  // also when empty: waits count commits
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0, left = row_bytes / STEP, tile = first_tile; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the step is there, and everyone has left the stage that is loaded next
        load(step + STAGES - 1);
        multiply_step(sums, query_stages[step % STAGES], bank_stages[step % STAGES], first_row, first_column);
        if (--left > 0) continue;
        left = row_bytes / STEP;
        int column = tile++ * TILE + first_column + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    int row = column + j * 8 + k % 2;
                    float value = similarity(sums[i][j][k], scales, row);
                    if (row < num_rows && value > nearest[i * 2 + k / 2]) {
                        nearest[i * 2 + k / 2] = value;
                        place[i * 2 + k / 2] = row;
                    }
                    sums[i][j][k] = 0;
                }
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES * 2; i++) {
        unsigned long long key = static_cast<unsigned long long>(ordered(nearest[i])) << 32 | ~static_cast<uint32_t>(place[i]);
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {  // the 4 lanes that share the row
            unsigned long long theirs = __shfl_xor_sync(ALL_LANES, key, other);
            key = key > theirs ? key : theirs;
        }
        int query = first_query + first_row + i / 2 * 16 + i % 2 * 8 + lane / 4;
        if (lane % 4 == 0) atomicMax(best + static_cast<size_t>(tap) * padded_queries + query, key);
    }
}

#define MATCH(name, Sum)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)                                                       \
        name(const uint8_t *queries, const uint8_t *bank, const float *scales, unsigned long long *best,           \
             int padded_queries, int num_rows, int padded_rows, int row_bytes, int tiles_per_block) {              \
        match<Sum>(queries, bank, scales, best, padded_queries, num_rows, padded_rows, row_bytes, tiles_per_block); \
    }

MATCH(match_f16, float)
MATCH(match_i8, int)

/// The maxima of all taps to distances: 1 - mean similarity; rows of the bank, -1 where a feature was not finite.
/// Args:
///   best, inverse: [taps, padded_queries]; distance: [batch, patches]; nearest: [batch, taps, patches].
///   gains: [taps, num_rows], scaled: [batch, patches]: sums of each tap's 1 - similarity, at least 0, times the gain
///     of its nearest row; both null, or neither.
extern "C" __global__ void __launch_bounds__(THREADS)
    match_distance(const unsigned long long *__restrict__ best, const float *__restrict__ inverse,
                   float *__restrict__ distance, int *__restrict__ nearest, const float *__restrict__ gains,
                   float *__restrict__ scaled, int num_queries, int patches, int taps, int padded_queries,
                   int num_rows) {
    int query = blockIdx.x * THREADS + threadIdx.x;
    if (query >= num_queries) return;
    float total = 0, scaled_total = 0;
    for (int tap = 0; tap < taps; tap++) {
        unsigned long long key = best[tap * padded_queries + query];
        float value = from_ordered(static_cast<uint32_t>(key >> 32)) * inverse[tap * padded_queries + query];
        int row = value == value ? static_cast<int>(~static_cast<uint32_t>(key)) : -1;
        total += value;
        nearest[(query / patches * taps + tap) * patches + query % patches] = row;
        if (gains != nullptr)
            scaled_total += row < 0 ? value : gains[static_cast<size_t>(tap) * num_rows + row] * fmaxf(1 - value, 0);
    }
    distance[query] = 1 - total / static_cast<float>(taps);
    if (gains != nullptr) scaled[query] = scaled_total;
}
