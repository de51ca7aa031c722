// One level against plain arithmetic, for machines that only an emulator stands in for (test_aarch64.py).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/cpu/kernels.h"

using namespace agpt;

static int failures = 0;
static void check(bool right, const char* what) {
  if (!right) ++failures, std::printf("wrong: %s\n", what);
}
static double uniform() { return std::rand() / (double)RAND_MAX * 2 - 1; }

// Both passes over random BGR pixels with random weights, against sums in 64 bits.
static void resample(const Kernels& k, int height, int width, int size) {
  std::vector<uint8_t> pixels((size_t)height * width * 3);
  for (auto& p : pixels) p = (uint8_t)std::rand();
  const int taps = 7, blocks = 3;
  auto make = [&](int length, std::vector<int32_t>& first, std::vector<int32_t>& flat, std::vector<uint8_t>& packed) {
    Filter f{};
    flat.assign((size_t)size * blocks * 4, 0), first.resize(size), packed.resize((size_t)size * blocks * k.weight_bytes);
    f.begin = 0, f.end = length;
    for (int i = 0; i < size; ++i) {
      const int start = std::rand() % (length - taps + 1);
      first[i] = start / 4;
      for (int t = 0; t < taps; ++t) flat[(size_t)i * blocks * 4 + start % 4 + t] = (int32_t)(uniform() * 900000);
      for (int b = 0; b < blocks; ++b)
        k.pack_weights(&flat[((size_t)i * blocks + b) * 4], &packed[((size_t)i * blocks + b) * k.weight_bytes]);
    }
    f.outputs = size, f.blocks = blocks, f.first = first.data(), f.weights = packed.data();
    return f;
  };
  std::vector<int32_t> first_x, first_y, weights_x, weights_y;
  std::vector<uint8_t> packed_x, packed_y;
  Cut cut{};
  cut.frame = {pixels.data(), width * 3, 3, 1, height, width, Format::BGR8};
  cut.width = width, cut.height = height;
  cut.across = make(width, first_x, weights_x, packed_x), cut.down = make(height, first_y, weights_y, packed_y);
  cut.narrow_stride = (size * 16 + 63) / 64 * 64;
  const int groups = (height + 3) / 4;
  std::vector<uint8_t> narrow((size_t)(groups + blocks) * cut.narrow_stride), scratch(k.columns_scratch(cut));
  std::vector<float> table(768), out((size_t)3 * size * size);
  for (int i = 0; i < 768; ++i) table[i] = (float)(i % 256);
  cut.narrow = narrow.data(), cut.table = table.data(), cut.out = out.data(), cut.out_bytes = 4;
  k.columns(cut, 0, groups, scratch.data());
  k.rows(cut, 0, size);
  auto level = [](int64_t sum) { return std::min<int64_t>(255, std::max<int64_t>(0, (sum + (1 << 21)) >> 22)); };
  for (int c = 0; c < 3; ++c)
    for (int y = 0; y < size; ++y)
      for (int x = 0; x < size; ++x) {
        int64_t sum = 0;
        for (int j = 0; j < blocks * 4; ++j) {
          const int row = first_y[y] * 4 + j;
          if (row >= height) continue;
          int64_t across = 0;
          for (int i = 0; i < blocks * 4; ++i) {
            const int column = first_x[x] * 4 + i;
            if (column < width)
              across += (int64_t)weights_x[(size_t)x * blocks * 4 + i] * pixels[((size_t)row * width + column) * 3 + 2 - c];
          }
          sum += (int64_t)weights_y[(size_t)y * blocks * 4 + j] * level(across);
        }
        check(out[((size_t)c * size + y) * size + x] == (float)level(sum), "resample");
      }
}

static void matching(const Kernels& k, Storage storage, int rows, int width, int queries) {
  const int group = storage == Storage::I8 ? k.group : 1, lanes = k.lanes;
  const int count = (rows + lanes - 1) / lanes, depth = (width + group - 1) / group;
  std::vector<int8_t> bank((size_t)rows * width);
  for (auto& v : bank) v = (int8_t)(uniform() * 127);
  const int item = storage == Storage::I8 ? 1 : 4;
  std::vector<uint8_t> values((size_t)count * depth * lanes * group * item);
  std::vector<float> scales(count * lanes), bias(count * lanes, -INFINITY);
  std::vector<int32_t> start(count * lanes);
  for (int r = 0; r < rows; ++r) {
    bias[r] = 0, scales[r] = 0.01f;
    for (int i = 0; i < width; ++i) {
      const size_t at = ((size_t)(r / lanes) * depth + i / group) * lanes * group + (r % lanes) * group + i % group;
      const int8_t value = bank[(size_t)r * width + i];
      if (item == 1)
        values[at] = (uint8_t)value, start[r] -= k.offset * value;
      else
        ((float*)values.data())[at] = value * 0.01f;
    }
  }
  std::vector<float> query((size_t)queries * width), similarity(queries);
  std::vector<int32_t> nearest(queries);
  for (auto& v : query) v = (float)((int)(uniform() * 127));
  for (int q = 0; q < queries; ++q) query[(size_t)q * width] = 127;  // its largest value: int8 rounds nothing
  const Panels panels = {storage, rows, width, count, depth, values.data(), scales.data(), bias.data(), start.data()};
  const MatchTask task = {panels, query.data(), queries, similarity.data(), nearest.data()};
  std::vector<uint8_t> scratch(k.match_scratch(panels, queries) + 64);
  k.match(task, (uint8_t*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63));
  for (int q = 0; q < queries; ++q) {
    double length = 0, best = -1e30;
    for (int i = 0; i < width; ++i) length += (double)query[(size_t)q * width + i] * query[(size_t)q * width + i];
    for (int r = 0; r < rows; ++r) {
      double sum = 0;
      for (int i = 0; i < width; ++i) sum += (double)query[(size_t)q * width + i] * bank[(size_t)r * width + i] * 0.01;
      best = std::max(best, sum / std::sqrt(length));
    }
    check(std::fabs(similarity[q] - best) < 1e-5 * std::max(1.0, std::fabs(best)), "match");
  }
}

static void maps(const Kernels& k, int side, int size, int taps) {
  std::vector<float> grid((size_t)taps * side * side), out((size_t)size * size);
  std::vector<float> scratch((size_t)(taps * side + 1) * (size + 64));
  for (auto& v : grid) v = (float)(uniform() * 20);
  k.localise(grid.data(), taps, side, out.data(), size, 0, size, scratch.data());
  for (int y = 0; y < size; ++y)
    for (int x = 0; x < size; ++x) {
      const double v = (double)y * (side - 1) / (size - 1), u = (double)x * (side - 1) / (size - 1);
      const int top = std::min((int)v, side - 2), left = std::min((int)u, side - 2);
      double sum = 0;
      for (int t = 0; t < taps; ++t) {
        const float* g = &grid[((size_t)t * side + top) * side + left];
        const double du = u - left, dv = v - top;
        const double z = (g[0] * (1 - du) + g[1] * du) * (1 - dv) + (g[side] * (1 - du) + g[side + 1] * du) * dv;
        sum += 1 / (1 + std::exp(-z)) / taps;
      }
      check(std::fabs(out[(size_t)y * size + x] - sum) < 1e-5, "localise");
    }
}

static void cell_peaks(const Kernels& k, int height, int width, int cells) {
  std::vector<float> map((size_t)height * width), out((size_t)cells * cells), scratch(width);
  for (auto& v : map) v = (float)uniform();
  k.cell_peaks(map.data(), height, width, cells, out.data(), scratch.data());
  const auto cell_of = [&](int i, int size) { return i == 0 ? 0 : (i * cells + size - 1) / size - 1; };
  std::vector<float> peaks((size_t)cells * cells, -INFINITY);
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x) {
      float& peak = peaks[cell_of(y, height) * cells + cell_of(x, width)];
      peak = std::max(peak, map[(size_t)y * width + x]);
    }
  check(out == peaks, "cell_peaks");
}

int main() {
  const Kernels& k = *KERNELS();
  for (int seed = 0; seed < 8; ++seed) {
    std::srand(seed);
    resample(k, 9 + 13 * seed, 8 + 17 * seed, 5 + 3 * seed);
    matching(k, Storage::F32, 1 + 11 * seed, 3 + 30 * seed, 1 + 9 * seed);
    matching(k, Storage::I8, 1 + 11 * seed, 3 + 30 * seed, 1 + 9 * seed);
    maps(k, 2 + seed, 5 + 20 * seed, 1 + seed % 4);
    cell_peaks(k, 1 + 15 * seed, 1 + 23 * seed, 1 + seed);
  }
  std::printf("%s: %d wrong\n", k.name, failures);
  return failures != 0;
}
