// The same place of other images: for each patch of a normal image the nearest of a part's patches around that place.
//
// The part's patches of a grid row lie side by side, value by value. For two neighbouring patches of the normal image
// one vector holds the products with up to kLanes neighbouring patches of the part, in up to kPlaceRows grid rows.
#pragma once

namespace {

constexpr int kPlaceRows = 5;  // 10 of 16 registers are sums

// Patches to a grid row with what lies beyond its ends: `radius` on the left; the rest is read with the last patches.
int32_t places_stride(int32_t side, int32_t radius) { return (side + 2 * radius + 2 + 2 * kLanes) / kLanes * kLanes; }

// Unit-length floats of a grid row, [k][stride]; zero where a patch is not finite, which `finite` notes.
void pack_places(const float* patches, int32_t side, int32_t width, int32_t radius, float* packed, uint8_t* finite) {
  const int32_t stride = places_stride(side, radius);
  for (int32_t k = 0; k < width; ++k) {
    for (int32_t x = 0; x < radius; ++x) packed[(size_t)k * stride + x] = 0;
    for (int32_t x = radius + side; x < stride; ++x) packed[(size_t)k * stride + x] = 0;
  }
  for (int32_t x = 0; x < side; ++x, patches += width) {
    const Measure size = measure(patches, width);
    finite[x] = size.finite;
    for (int32_t k = 0; k < width; ++k)
      packed[(size_t)k * stride + radius + x] = size.finite ? patches[k] * size.inverse_length : 0;
  }
}

template <int kRows>
inline void tile_places(const PlacesTask& task, const float* rows, const float* first, const float* second, F* best) {
  const size_t row_step = (size_t)task.width * task.stride;
  F sums[kRows][2] = {};
  for (int32_t k = 0; k < task.width; ++k, rows += task.stride) {
    const F a = fill(first[k]), b = fill(second[k]);
#pragma GCC unroll 5
    for (int y = 0; y < kRows; ++y) {
      const F values = load(rows + y * row_step);
      sums[y][0] = multiply_add(a, values, sums[y][0]);
      sums[y][1] = multiply_add(b, values, sums[y][1]);
    }
  }
#pragma GCC unroll 5
  for (int y = 0; y < kRows; ++y)
    for (int i = 0; i < 2; ++i) best[i] = sums[y][i] > best[i] ? sums[y][i] : best[i];
}

// One grid row of all references.
void match_places(const PlacesTask& task) {
  const int32_t side = task.side, radius = task.radius, width = task.width;
  for (int32_t x = 0; x < side; x += 2) {
    const int32_t left = x + 1 < side || x == 0 ? x : x - 1, right = left + 1 < side ? left + 1 : left;
    for (int32_t index = 0; index < task.count; ++index) {
      const float* reference = task.reference + index * task.reference_step;
      const float *first = reference + (size_t)left * width, *second = reference + (size_t)right * width;
      float highest[2] = {-__builtin_inff(), -__builtin_inff()};
      // Column `left - radius` of the grid lies `left` patches into a packed row.
      for (int32_t column = left - radius; column <= right + radius; column += kLanes) {
        F best[2] = {fill(-__builtin_inff()), fill(-__builtin_inff())};
        const float* rows = task.rows + column + radius;
        for (int32_t y = 0; y < task.num_rows; y += kPlaceRows, rows += (size_t)kPlaceRows * width * task.stride)
          switch (task.num_rows - y) {
            case 1: tile_places<1>(task, rows, first, second, best); break;
            case 2: tile_places<2>(task, rows, first, second, best); break;
            case 3: tile_places<3>(task, rows, first, second, best); break;
            case 4: tile_places<4>(task, rows, first, second, best); break;
            default: tile_places<kPlaceRows>(task, rows, first, second, best);
          }
        for (int i = 0; i < 2; ++i) {
          const int32_t place = i ? right : left;
          const int32_t begin = place - radius > 0 ? place - radius : 0;
          const int32_t end = place + radius + 1 < side ? place + radius + 1 : side;
          for (int lane = 0; lane < kLanes; ++lane)
            if (column + lane >= begin && column + lane < end && best[i][lane] > highest[i]) highest[i] = best[i][lane];
        }
      }
      task.out[index * task.out_step + left] = 1 - highest[0];
      task.out[index * task.out_step + right] = 1 - highest[1];
    }
  }
}

}  // namespace
