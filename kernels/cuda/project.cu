// Maps of boxes back onto their frame: every frame pixel gathers from the maps that cover it, overlaps blended.
//
// 1920 x 1080, 12 tiles of 224 x 224 with a quarter overlap: 8.3 MB written, 2.4 MB of maps read (1.5 times, L2).
// Orin 42 us of DRAM; about 60 instructions a pixel and map that covers it: 2 M x 1.5 x 60 / 2,048 lanes = 70 us.
// H200 3 us.
//
// Coordinates are kept exact without double precision in the inner loop: a block's corner is mapped in double, once
// a map, and a pixel adds its small offset to it.
#include "device.cuh"

constexpr int WIDTH = 32, HEIGHT = 8;  // of a block, frame pixels
constexpr int THREADS = WIDTH * HEIGHT;
constexpr float EDGE = 1e-4f;  // map pixels: a point on a map's edge belongs to it, whatever the rounding
constexpr float THINNEST = 1e-3f;

/// What a block needs of one map: the map's point of its first pixel, and the steps to the next.
struct View {
    float u, v, ux, uy, vx, vy;
    int touches;
};

__device__ View view(const double *p, int x, int y, int size) {
    double u = p[0] * (x + 0.5) + p[1] * (y + 0.5) + p[2], v = p[3] * (x + 0.5) + p[4] * (y + 0.5) + p[5];
    View view = {static_cast<float>(u),    static_cast<float>(v),    static_cast<float>(p[0]), static_cast<float>(p[1]),
                 static_cast<float>(p[3]), static_cast<float>(p[4]), 1};
    float reach_u = fabsf(view.ux) * WIDTH + fabsf(view.uy) * HEIGHT, reach_v = fabsf(view.vx) * WIDTH + fabsf(view.vy) * HEIGHT;
    float side = static_cast<float>(size);
    view.touches = view.u >= -reach_u - 1 && view.u <= side + reach_u + 1 && view.v >= -reach_v - 1 && view.v <= side + reach_v + 1;
    return view;
}

__device__ __forceinline__ float distance_to_edge(float u, float side) { return fmaxf(fminf(u, side - u), THINNEST); }

/// Value at a point counted from the corner; beyond the outermost pixel centres the edge repeats.
__device__ __forceinline__ float bilinear(const float *map, int size, float u, float v) {
    float last = static_cast<float>(size - 1);
    u = fminf(fmaxf(u - 0.5f, 0.0f), last), v = fminf(fmaxf(v - 0.5f, 0.0f), last);
    int left = static_cast<int>(u), top = static_cast<int>(v);
    int right = min(left + 1, size - 1), bottom = min(top + 1, size - 1);
    float du = u - static_cast<float>(left), dv = v - static_cast<float>(top);
    float above = __ldg(map + top * size + left) * (1 - du) + __ldg(map + top * size + right) * du;
    float below = __ldg(map + bottom * size + left) * (1 - du) + __ldg(map + bottom * size + right) * du;
    return above * (1 - dv) + below * dv;
}

/// Args:
///   maps: [num_maps, size, size]; places: [num_maps, 6], geometry.frame_to_map.
///   out: [height, width]; `outside` where no map lies.
/// Grid: (ceil(width / 32), ceil(height / 8)), 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS)
    project(const float *__restrict__ maps, const double *__restrict__ places, float *__restrict__ out, int num_maps,
            int size, int width, int height, float outside) {
    __shared__ View views[THREADS];
    int dx = threadIdx.x % WIDTH, dy = threadIdx.x / WIDTH;
    int left = blockIdx.x * WIDTH, top = blockIdx.y * HEIGHT;
    float side = static_cast<float>(size), total = 0, weights = 0;
    for (int first = 0; first < num_maps; first += THREADS) {
        int count = min(THREADS, num_maps - first), mine = threadIdx.x;
        __syncthreads();
        if (mine < count) views[mine] = view(places + (first + mine) * 6, left, top, size);
        __syncthreads();
        for (int i = 0; i < count; i++) {
            const View &seen = views[i];
            if (!seen.touches) continue;
            float u = seen.u + seen.ux * static_cast<float>(dx) + seen.uy * static_cast<float>(dy);
            float v = seen.v + seen.vx * static_cast<float>(dx) + seen.vy * static_cast<float>(dy);
            if (u < -EDGE || u > side + EDGE || v < -EDGE || v > side + EDGE) continue;
            float weight = distance_to_edge(u, side) * distance_to_edge(v, side);
            total += weight * bilinear(maps + static_cast<size_t>(first + i) * size * size, size, u, v);
            weights += weight;
        }
    }
    int x = left + dx, y = top + dy;
    if (x < width && y < height) out[static_cast<size_t>(y) * width + x] = weights > 0 ? total / weights : outside;
}
