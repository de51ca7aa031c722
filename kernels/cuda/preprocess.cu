// Camera pixels to the encoder's input in one pass: cut, colour, Pillow's bicubic filter, normalisation, layout.
//
// Reads the camera's own buffer (device memory, or host memory mapped into the device's address space) and writes
// nothing between: the 8-bit image that Pillow keeps between its passes lives in shared memory.
//
// 1920 x 1080 BGR8 -> 224 (crop): 3.5 MB read, 0.6 MB written (0.3 MB in float16); 20 taps a pass.
// A tile's rows overlap with its neighbours' by the filter's support: 1.5 times the sums of a whole-frame pass,
// 6 M horizontal taps (3 colours each) of about 10 instructions.
//   AGX Orin (204.8 GB/s, 16 SMs, 1.3 GHz): DRAM 20 us, instructions 25 us
//   H200 (4.8 TB/s, 132 SMs, 1.8 GHz):      DRAM 1 us, instructions 2 us; latency of 3 dependent phases on top
//
// A block makes 16 x 16 output pixels. It takes the input rows they need 32 at a time and the columns 128 at a time:
//   strip: 32 x 128 pixels, colour converted, one word each     (lanes along a row: coalesced)
//   sums:  a warp takes one output column, its lanes the 32 rows (weights uniform, banks distinct)
//   middle: 32 x 16 pixels, the horizontal pass's result
//   each thread adds the rows of `middle` that its own output pixel needs.
// Any size of frame or box passes through the same 19 KB.
#include "device.cuh"

constexpr int SIDE = 16;     // of a block's square of output pixels
constexpr int ROWS = 32;     // input rows at a time
constexpr int COLUMNS = 128; // input columns at a time
constexpr int THREADS = SIDE * SIDE;
constexpr int SUMS = ROWS * SIDE / THREADS;  // horizontal sums of a thread
constexpr int PRECISION_BITS = 22;           // Pillow's

/// Where a frame lies. NV12 alone has `chroma`; its rows are `stride` bytes apart, too.
struct Frame {
    const uint8_t *pixels, *chroma;
    int stride, width, height;
};

/// One pass of the filter: offsets into `tables` of starts [size], counts [size], weights [taps, size].
struct Pass {
    int starts, counts, weights;
};

/// A box: its corner or, `rotated`, the fixed-point affine map of sampling.py; and its passes.
struct Square {
    long long rotation[6];
    int x, y, rotated;
    Pass across, down;
    int padding;
};

struct Pixel {
    int blue, green, red;
};

__device__ __forceinline__ int clamp(int x, int low, int high) { return max(low, min(x, high)); }
__device__ __forceinline__ uint32_t pack(Pixel p) { return p.blue | p.green << 8 | p.red << 16; }

/// BT.601, studio range, as OpenCV's integers of 1 / 2^20.
__device__ __forceinline__ Pixel from_yuv(int y, int u, int v) {
    int luma = max(y - 16, 0) * 1220542 + (1 << 19);
    u -= 128, v -= 128;
    return {clamp((luma + 2116026 * u) >> 20, 0, 255), clamp((luma - 852492 * v - 409993 * u) >> 20, 0, 255),
            clamp((luma + 1673527 * v) >> 20, 0, 255)};
}

struct BGR8 {
    static __device__ Pixel at(const Frame &frame, int x, int y) {
        const uint8_t *p = frame.pixels + static_cast<size_t>(y) * frame.stride + 3 * x;
        return {__ldg(p), __ldg(p + 1), __ldg(p + 2)};
    }
};

struct RGB8 {
    static __device__ Pixel at(const Frame &frame, int x, int y) {
        Pixel p = BGR8::at(frame, x, y);
        return {p.red, p.green, p.blue};
    }
};

struct Mono8 {
    static __device__ Pixel at(const Frame &frame, int x, int y) {
        int level = __ldg(frame.pixels + static_cast<size_t>(y) * frame.stride + x);
        return {level, level, level};
    }
};

struct NV12 {
    static __device__ Pixel at(const Frame &frame, int x, int y) {
        const uint8_t *uv = frame.chroma + static_cast<size_t>(y / 2) * frame.stride + (x & -2);
        return from_yuv(Mono8::at(frame, x, y).red, __ldg(uv), __ldg(uv + 1));
    }
};

struct YUYV {
    static __device__ Pixel at(const Frame &frame, int x, int y) {
        const uint8_t *pair = frame.pixels + static_cast<size_t>(y) * frame.stride + 2 * (x & -2);
        return from_yuv(__ldg(pair + 2 * (x & 1)), __ldg(pair + 1), __ldg(pair + 3));
    }
};

/// Bilinear demosaicing, halves up; even rows hold R G R G ..., odd rows G B G B ...
struct BayerRG8 {
    static __device__ Pixel at(const Frame &frame, int x, int y) {
        x = clamp(x, 1, frame.width - 2), y = clamp(y, 1, frame.height - 2);
        const uint8_t *p = frame.pixels + static_cast<size_t>(y) * frame.stride + x, *above = p - frame.stride,
                      *below = p + frame.stride;
        int own = __ldg(p), left_right = __ldg(p - 1) + __ldg(p + 1), up_down = __ldg(above) + __ldg(below);
        if ((x ^ y) & 1) {  // a green pixel
            int across = (left_right + 1) >> 1, down = (up_down + 1) >> 1;
            return y & 1 ? Pixel{across, own, down} : Pixel{down, own, across};
        }
        int cross = (left_right + up_down + 2) >> 2;
        int corners = (__ldg(above - 1) + __ldg(above + 1) + __ldg(below - 1) + __ldg(below + 1) + 2) >> 2;
        return y & 1 ? Pixel{own, cross, corners} : Pixel{corners, cross, own};
    }
};

/// Pixel (u, v) of a rotated box: bilinear between frame pixels with weights of 1 / 256, the edge repeated.
template <class Format> __device__ Pixel rotated_at(const Frame &frame, const long long *rotation, int u, int v) {
    int x = static_cast<int>((rotation[0] * u + rotation[1] * v + rotation[2] + (1 << 23)) >> 24);
    int y = static_cast<int>((rotation[3] * u + rotation[4] * v + rotation[5] + (1 << 23)) >> 24);
    Pixel sum = {1 << 15, 1 << 15, 1 << 15};
#pragma unroll
    for (int corner = 0; corner < 4; corner++) {
        int dx = corner % 2, dy = corner / 2;
        int weight = (dx ? x & 255 : 256 - (x & 255)) * (dy ? y & 255 : 256 - (y & 255));
        Pixel p = Format::at(frame, clamp((x >> 8) + dx, 0, frame.width - 1), clamp((y >> 8) + dy, 0, frame.height - 1));
        sum.blue += weight * p.blue, sum.green += weight * p.green, sum.red += weight * p.red;
    }
    return {sum.blue >> 16, sum.green >> 16, sum.red >> 16};
}

__device__ __forceinline__ void accumulate(Pixel &sum, int weight, uint32_t pixel) {
    sum.blue += weight * static_cast<int>(pixel & 255);
    sum.green += weight * static_cast<int>(pixel >> 8 & 255);
    sum.red += weight * static_cast<int>(pixel >> 16);
}

__device__ __forceinline__ int level(int sum) { return clamp((sum + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS, 0, 255); }
__device__ __forceinline__ Pixel levels(Pixel sum) { return {level(sum.blue), level(sum.green), level(sum.red)}; }

/// Args:
///   squares: [gridDim.z]; tables: what their passes point to; normalisation: float [3, 256], RGB.
///   out: [gridDim.z, 3, size, size], RGB.
/// Grid: (ceil(size / 16), ceil(size / 16), squares), 256 threads.
template <class Format, class Out>
__device__ void preprocess(const Frame &frame, const Square *__restrict__ squares, const int *__restrict__ tables,
                           const float *__restrict__ normalisation, Out *__restrict__ out, int size) {
    __shared__ uint32_t strip[ROWS][COLUMNS + 1];
    __shared__ uint32_t middle[ROWS][SIDE + 1];
    const Square &square = squares[blockIdx.z];
    const int *across_starts = tables + square.across.starts, *across_counts = tables + square.across.counts,
              *across_weights = tables + square.across.weights;
    const int *down_starts = tables + square.down.starts, *down_counts = tables + square.down.counts,
              *down_weights = tables + square.down.weights;

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int first_x = blockIdx.x * SIDE, last_x = min(first_x + SIDE, size) - 1;
    int first_y = blockIdx.y * SIDE, last_y = min(first_y + SIDE, size) - 1;
    int left = across_starts[first_x], right = across_starts[last_x] + across_counts[last_x];
    int top = down_starts[first_y], bottom = down_starts[last_y] + down_counts[last_y];

    int x = first_x + static_cast<int>(threadIdx.x) % SIDE, y = first_y + static_cast<int>(threadIdx.x) / SIDE;
    bool real = x < size && y < size;
    int own_start = real ? down_starts[y] : 0, own_count = real ? down_counts[y] : 0;
    Pixel own = {};
    for (int row = top; row < bottom; row += ROWS) {
        int rows = min(ROWS, bottom - row);
        Pixel sums[SUMS] = {};
        for (int column = left; column < right; column += COLUMNS) {
            int columns = min(COLUMNS, right - column);
            __syncthreads();  // everyone is done with the strip
#pragma unroll 1
            for (int v = warp; v < rows; v += THREADS / WARP)
#pragma unroll 1  // registers: a pixel of some formats needs many
                for (int u = lane; u < columns; u += WARP)
                    strip[v][u] = pack(square.rotated ? rotated_at<Format>(frame, square.rotation, column + u, row + v)
                                                      : Format::at(frame, square.x + column + u, square.y + row + v));
            __syncthreads();
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                int output = first_x + warp + i * (THREADS / WARP);
                if (output > last_x || lane >= rows) continue;
                int start = across_starts[output];
                int from = max(start, column), to = min(start + across_counts[output], column + columns);
#pragma unroll 4
                for (int at = from; at < to; at++)
                    accumulate(sums[i], __ldg(across_weights + static_cast<size_t>(at - start) * size + output),
                               strip[lane][at - column]);
            }
        }
#pragma unroll
        for (int i = 0; i < SUMS; i++) middle[lane][warp + i * (THREADS / WARP)] = pack(levels(sums[i]));
        __syncthreads();  // the next write to `middle` comes after the next strip's barriers
        int from = max(own_start, row), to = min(own_start + own_count, row + rows);
        for (int at = from; at < to; at++)
            accumulate(own, __ldg(down_weights + static_cast<size_t>(at - own_start) * size + y), middle[at - row][x - first_x]);
    }
    if (!real) return;
    Pixel pixel = levels(own);
    size_t plane = static_cast<size_t>(size) * size, place = blockIdx.z * 3 * plane + static_cast<size_t>(y) * size + x;
    out[place] = from_float<Out>(__ldg(normalisation + pixel.red));
    out[place + plane] = from_float<Out>(__ldg(normalisation + 256 + pixel.green));
    out[place + 2 * plane] = from_float<Out>(__ldg(normalisation + 512 + pixel.blue));
}

#define PREPROCESS(name, Format, Out)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                        \
        name(const uint8_t *pixels, const uint8_t *chroma, int stride, int width, int height, const Square *squares, \
             const int *tables, const float *normalisation, Out *out, int size) {                                   \
        preprocess<Format>({pixels, chroma, stride, width, height}, squares, tables, normalisation, out, size);     \
    }

PREPROCESS(preprocess_BGR8_f32, BGR8, float)
PREPROCESS(preprocess_BGR8_f16, BGR8, __half)
PREPROCESS(preprocess_RGB8_f32, RGB8, float)
PREPROCESS(preprocess_RGB8_f16, RGB8, __half)
PREPROCESS(preprocess_Mono8_f32, Mono8, float)
PREPROCESS(preprocess_Mono8_f16, Mono8, __half)
PREPROCESS(preprocess_NV12_f32, NV12, float)
PREPROCESS(preprocess_NV12_f16, NV12, __half)
PREPROCESS(preprocess_YUYV_f32, YUYV, float)
PREPROCESS(preprocess_YUYV_f16, YUYV, __half)
PREPROCESS(preprocess_BayerRG8_f32, BayerRG8, float)
PREPROCESS(preprocess_BayerRG8_f16, BayerRG8, __half)
