// Matching: a matrix product whose result is never written. A tile of queries × bank rows is summed in registers over
// the whole width, then only its maximum over the bank lives on, lane by lane, with the panel it came from.
#pragma once

namespace {

struct Best {
  float* value;    // [queries][kLanes]
  int32_t* place;  // [queries][kLanes]: the lane's first row, without the lane's number
};

inline void keep(const Best& best, int64_t query, const F* values, int32_t first_row) {
  F value = values[0];
  I place = fill(first_row);
  for (int v = 1; v < kTileVectors; ++v) {
    const I higher = values[v] > value;
    value = higher ? values[v] : value;
    place = higher ? fill(first_row + v * kLanes) : place;
  }
  const F old = load(best.value + query * kLanes);
  const I higher = value > old;
  store(best.value + query * kLanes, higher ? value : old);
  store(best.place + query * kLanes, higher ? place : load(best.place + query * kLanes));
}

template <int kRows>
inline void tile_floats(const float* queries, const float* bank, int32_t depth, const float* bias, int32_t first_row,
                        const Best& best, int64_t query) {
  F sums[kRows][kTileVectors] = {};
  for (int32_t k = 0; k < depth; ++k, queries += kTileRows, bank += kPanel) {
    F row[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) row[v] = load(bank + v * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < kRows; ++q) {
      const F value = fill(queries[q]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[q][v] = multiply_add(value, row[v], sums[q][v]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kRows; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[q][v] = sums[q][v] + load(bias + v * kLanes);
    keep(best, query + q, sums[q], first_row);
  }
}

template <int kRows>
inline void tile_bytes(const Query* queries, const int8_t* bank, int32_t depth, const int32_t* start,
                       const float* scales, const float* bias, int32_t first_row, const Best& best, int64_t query) {
  I sums[kRows][kTileVectors];
#pragma GCC unroll 16
  for (int q = 0; q < kRows; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[q][v] = load(start + v * kLanes);
  for (int32_t k = 0; k < depth; ++k, queries += kTileRows * kGroup, bank += kPanel * kGroup) {
    BankVector row[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) memcpy(&row[v], bank + v * kLanes * kGroup, sizeof row[v]);
#pragma GCC unroll 16
    for (int q = 0; q < kRows; ++q) {
      const int32_t value = load_query(queries + q * kGroup);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[q][v] = dot(sums[q][v], value, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kRows; ++q) {
    F values[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v)
      values[v] = to_float(sums[q][v]) * load(scales + v * kLanes) + load(bias + v * kLanes);
    keep(best, query + q, values, first_row);
  }
}

// -- queries ---------------------------------------------------------------------------------------------------------------

constexpr double kCosineEpsilon = 1e-8;  // as torch: a shorter vector is similar to nothing
constexpr float kSmallest = 1e-30f;      // of a query's largest value: below, it counts as zero

struct Measure {
  bool finite;
  float inverse_length, peak;
};

inline Measure measure(const float* query, int32_t width) {
  double squares[8] = {};
  float peaks[8] = {};
  int32_t k = 0;
  for (; k + 8 <= width; k += 8)
    for (int i = 0; i < 8; ++i) {
      const float value = query[k + i], size = value < 0 ? -value : value;
      squares[i] += (double)value * value;
      peaks[i] = size > peaks[i] ? size : peaks[i];
    }
  for (; k < width; ++k) {
    const float value = query[k], size = value < 0 ? -value : value;
    squares[0] += (double)value * value;
    peaks[0] = size > peaks[0] ? size : peaks[0];
  }
  double square = 0;
  float peak = 0;
  for (int i = 0; i < 8; ++i) {
    square += squares[i];
    peak = peaks[i] > peak ? peaks[i] : peak;
  }
  // Squares of finite floats do not overflow a double, so a sum that is not finite means a query that is not.
  const double length = __builtin_sqrt(square);
  const bool finite = square - square == 0;
  return {finite, (float)(1 / (length > kCosineEpsilon ? length : kCosineEpsilon)), peak};
}

inline float round_to_even(float x) {  // |x| ≤ 2**22
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

inline int32_t tiles_of(int32_t num_queries) { return (num_queries + kTileRows - 1) / kTileRows; }

size_t padded(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

size_t match_scratch(const Panels& panels, int32_t num_queries) {
  const size_t queries = (size_t)tiles_of(num_queries) * kTileRows;
  const size_t packed = panels.storage == Storage::I8 ? (size_t)panels.depth * kQueryBytes : (size_t)panels.width * 4;
  const size_t widened = panels.storage == Storage::F16 ? (size_t)panels.width * kPanel * 4 : 0;
  return padded(queries * packed) + padded(widened) + 2 * padded(queries * kLanes * 4) + padded(queries * 4);
}

// Unit-length floats, [tile][k][kTileRows]; a factor of 1, or NaN where a query is not finite.
void pack_floats(const MatchTask& task, float* packed, float* factors) {
  const int32_t width = task.panels.width;
  for (int32_t q = 0; q < tiles_of(task.num_queries) * kTileRows; ++q) {
    float* out = packed + (size_t)(q / kTileRows) * width * kTileRows + q % kTileRows;
    const float* query = task.queries + (size_t)q * width;
    const bool given = q < task.num_queries;
    const Measure size = given ? measure(query, width) : Measure{true, 0, 0};
    factors[q] = size.finite ? 1.0f : __builtin_nanf("");
    if (given && size.finite)
      for (int32_t k = 0; k < width; ++k) out[(size_t)k * kTileRows] = query[k] * size.inverse_length;
    else
      for (int32_t k = 0; k < width; ++k) out[(size_t)k * kTileRows] = 0;
  }
}

// 127ths of each query's largest value, [tile][step][kTileRows][kGroup]; factors bring sums back to cosines.
void pack_bytes(const MatchTask& task, Query* packed, float* factors) {
  const int32_t width = task.panels.width, depth = task.panels.depth;
  for (int32_t q = 0; q < tiles_of(task.num_queries) * kTileRows; ++q) {
    Query* out = packed + ((size_t)(q / kTileRows) * depth * kTileRows + q % kTileRows) * kGroup;
    const float* query = task.queries + (size_t)q * width;
    const Measure size = q < task.num_queries ? measure(query, width) : Measure{true, 0, 0};
    const bool empty = !size.finite || size.peak < kSmallest;
    const float scale = empty ? 0 : 127.0f / size.peak;
    factors[q] = !size.finite ? __builtin_nanf("") : empty ? 0 : size.inverse_length * (size.peak / 127.0f);
    for (int32_t step = 0; step < depth; ++step, out += kTileRows * kGroup)
      for (int i = 0; i < kGroup; ++i) {
        const int32_t k = step * kGroup + i;
        const float value = empty || k >= width ? 0 : round_to_even(query[k] * scale);
        out[i] = (Query)((int32_t)value + kOffset);
      }
  }
}

// -- one tap -----------------------------------------------------------------------------------------------------------------

void match_floats(const MatchTask& task, const float* packed, float* widened, const Best& best) {
  const Panels& panels = task.panels;
  const size_t panel_values = (size_t)panels.width * kPanel;
  const int32_t tiles = tiles_of(task.num_queries);
  const int32_t in_last = task.num_queries - (tiles - 1) * kTileRows;
  for (int32_t panel = 0; panel < panels.count; ++panel) {
    const float* bank;
    if (panels.storage == Storage::F16) {
      halves_to_floats(panels.values + 2 * panel * panel_values, widened, (int64_t)panel_values);
      bank = widened;
    } else {
      bank = (const float*)panels.values + panel * panel_values;
    }
    const float* bias = panels.bias + (size_t)panel * kPanel;
    const float* queries = packed;
    for (int32_t tile = 0; tile < tiles; ++tile, queries += (size_t)panels.width * kTileRows) {
      const int64_t query = (int64_t)tile * kTileRows;
      if (tile == tiles - 1 && in_last <= kTileRows / 2)
        tile_floats<kTileRows / 2>(queries, bank, panels.width, bias, panel * kPanel, best, query);
      else
        tile_floats<kTileRows>(queries, bank, panels.width, bias, panel * kPanel, best, query);
    }
  }
}

void match_bytes(const MatchTask& task, const Query* packed, const Best& best) {
  const Panels& panels = task.panels;
  const int32_t tiles = tiles_of(task.num_queries);
  const int32_t in_last = task.num_queries - (tiles - 1) * kTileRows;
  for (int32_t panel = 0; panel < panels.count; ++panel) {
    const int8_t* bank = (const int8_t*)panels.values + (size_t)panel * panels.depth * kPanel * kGroup;
    const size_t lane = (size_t)panel * kPanel;
    const Query* queries = packed;
    for (int32_t tile = 0; tile < tiles; ++tile, queries += (size_t)panels.depth * kTileRows * kGroup) {
      const int64_t query = (int64_t)tile * kTileRows;
      if (tile == tiles - 1 && in_last <= kTileRows / 2)
        tile_bytes<kTileRows / 2>(queries, bank, panels.depth, panels.start + lane, panels.scales + lane,
                                  panels.bias + lane, panel * kPanel, best, query);
      else
        tile_bytes<kTileRows>(queries, bank, panels.depth, panels.start + lane, panels.scales + lane,
                              panels.bias + lane, panel * kPanel, best, query);
    }
  }
}

void match(const MatchTask& task, uint8_t* scratch) {
  const size_t queries = (size_t)tiles_of(task.num_queries) * kTileRows;
  const bool bytes = task.panels.storage == Storage::I8;
  const size_t packed_bytes =
      queries * (bytes ? (size_t)task.panels.depth * kQueryBytes : (size_t)task.panels.width * 4);
  uint8_t* packed = scratch;
  scratch += padded(packed_bytes);
  float* widened = (float*)scratch;
  scratch += padded(task.panels.storage == Storage::F16 ? (size_t)task.panels.width * kPanel * 4 : 0);
  const Best best = {(float*)scratch, (int32_t*)(scratch + padded(queries * kLanes * 4))};
  float* factors = (float*)(scratch + 2 * padded(queries * kLanes * 4));
  for (size_t i = 0; i < queries * kLanes; ++i) {
    best.value[i] = -__builtin_inff();
    best.place[i] = 0;
  }
  if (bytes) {
    pack_bytes(task, (Query*)packed, factors);
    match_bytes(task, (const Query*)packed, best);
  } else {
    pack_floats(task, (float*)packed, factors);
    match_floats(task, (const float*)packed, widened, best);
  }
  for (int32_t q = 0; q < task.num_queries; ++q) {
    const float* value = best.value + (size_t)q * kLanes;
    const int32_t* place = best.place + (size_t)q * kLanes;
    float highest = value[0];
    int32_t row = place[0];
    for (int lane = 1; lane < kLanes; ++lane) {
      const int32_t other = place[lane] + lane;
      if (value[lane] > highest || (value[lane] == highest && other < row)) {
        highest = value[lane];
        row = other;
      }
    }
    task.similarity[q] = highest * factors[q];
    task.nearest[q] = factors[q] != factors[q] ? -1 : row;
  }
}

// out[i] = rows[i] · vector.
void dots(const float* rows, int32_t num_rows, int32_t width, const float* vector, float* out) {
  for (int32_t i = 0; i < num_rows; ++i, rows += width) {
    F sums[4] = {};
    int32_t k = 0;
    for (; k + 4 * kLanes <= width; k += 4 * kLanes)
      for (int v = 0; v < 4; ++v)
        sums[v] = multiply_add(load(rows + k + v * kLanes), load(vector + k + v * kLanes), sums[v]);
    const F sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    for (; k < width; ++k) total += rows[k] * vector[k];
    out[i] = total;
  }
}

}  // namespace
