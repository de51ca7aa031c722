// Maps: the patches' grid to pixels, bilinear with aligned corners. Across first, once for every grid row, so that
// what is left is a mix of two rows that lie in memory as vectors do.
#pragma once

namespace {

inline void place(int32_t i, int32_t side, int32_t size, int32_t* low, float* share) {
  const double position = size > 1 ? (double)i * (side - 1) / (size - 1) : 0.0;
  const int32_t last = side > 1 ? side - 2 : 0;
  *low = (int32_t)position < last ? (int32_t)position : last;
  *share = side > 1 ? (float)(position - *low) : 0.0f;
}

inline int32_t row_floats(int32_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// [rows][side] → [rows][row_floats(size)], times `factor`. A column's place is worked out once for all rows.
inline void across(const float* grid, int32_t rows, int32_t side, float factor, int32_t size, float* out) {
  const int32_t stride = row_floats(size), right = side > 1 ? 1 : 0;
  constexpr int32_t kColumns = 64;
  int32_t low[kColumns];
  float share[kColumns];
  for (int32_t first = 0; first < size; first += kColumns) {
    const int32_t count = size - first < kColumns ? size - first : kColumns;
    for (int32_t i = 0; i < count; ++i) place(first + i, side, size, &low[i], &share[i]);
    for (int32_t row = 0; row < rows; ++row) {
      const float* values = grid + (ptrdiff_t)row * side;
      float* to = out + (ptrdiff_t)row * stride + first;
      for (int32_t i = 0; i < count; ++i)
        to[i] = factor * (values[low[i]] * (1 - share[i]) + values[low[i] + right] * share[i]);
    }
  }
  for (int32_t row = 0; row < rows; ++row)
    for (int32_t x = size; x < stride; ++x) out[(ptrdiff_t)row * stride + x] = 0;
}

inline bool all_finite(const float* values, int64_t count) {
  float sum = 0;  // of zeros, or NaN
  for (int64_t i = 0; i < count; ++i) sum += values[i] - values[i];
  return sum == 0;
}

inline void write_row(const float* row, float* out, int32_t size) { memcpy(out, row, (size_t)size * 4); }

inline void write_nan(float* out, int32_t size, int32_t first, int32_t last) {
  for (int64_t i = (int64_t)first * size; i < (int64_t)last * size; ++i) out[i] = __builtin_nanf("");
}

// scratch: (side + 1) × row_floats(size).
void upsample(const float* grid, int32_t side, float* out, int32_t size, int32_t first, int32_t last,
              float* scratch) {
  if (!all_finite(grid, (int64_t)side * side)) return write_nan(out, size, first, last);
  const int32_t stride = row_floats(size), below = side > 1 ? stride : 0;
  float *wide = scratch, *row = scratch + (ptrdiff_t)side * stride;
  across(grid, side, side, 1.0f, size, wide);
  for (int32_t y = first; y < last; ++y) {
    int32_t low;
    float share;
    place(y, side, size, &low, &share);
    const float* values = wide + (ptrdiff_t)low * stride;
    for (int32_t x = 0; x < stride; x += kLanes)
      store(row + x, load(values + x) * fill(1 - share) + load(values + below + x) * fill(share));
    write_row(row, out + (ptrdiff_t)y * size, size);
  }
}

// 2**x for |x| up to kFarthest: the integer part goes into the exponent, the rest through a polynomial of degree 5
// (minimax over -1/2 … 1/2, 7.5e-8 relative).
inline F power_of_two(F x) {
  const F magic = fill(12582912.0f);  // 1.5 × 2**23: rounds to an integer, which lies in the lowest bits then
  const F shifted = x + magic;
  const F rest = x - (shifted - magic);
  F value = fill(1.327647129e-3f);
  value = multiply_add(value, rest, fill(9.675540961e-3f));
  value = multiply_add(value, rest, fill(5.550713092e-2f));
  value = multiply_add(value, rest, fill(2.402212024e-1f));
  value = multiply_add(value, rest, fill(6.931469440e-1f));
  value = multiply_add(value, rest, fill(1.0f));
  U bits, exponent;
  memcpy(&bits, &value, sizeof bits);
  memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr float kLog2E = 1.44269504f;
constexpr float kFarthest = 28.0f;  // 1 / (1 + 2**28) is 4e-9; four taps' product stays below 2**127
constexpr int32_t kTapsPerDivision = 4;

// differences: [taps][side × side] of one image; scratch: (taps × side + 1) × row_floats(size).
//
// The mean of the taps' 1 / (1 + 2**-d): fractions are added as fractions, so that four taps cost one division.
void localise(const float* differences, int32_t taps, int32_t side, float* out, int32_t size, int32_t first,
              int32_t last, float* scratch) {
  if (!all_finite(differences, (int64_t)taps * side * side)) return write_nan(out, size, first, last);
  const int32_t stride = row_floats(size), below = side > 1 ? stride : 0;
  const ptrdiff_t tap_floats = (ptrdiff_t)side * stride;
  float *wide = scratch, *row = scratch + taps * tap_floats;
  across(differences, taps * side, side, -kLog2E, size, wide);
  const F farthest = fill(kFarthest), nearest = fill(-kFarthest), one = fill(1.0f), count = fill((float)taps);
  for (int32_t y = first; y < last; ++y) {
    int32_t low;
    float share;
    place(y, side, size, &low, &share);
    const F upper = fill(1 - share), lower = fill(share);
    for (int32_t x = 0; x < stride; x += kLanes) {
      const float* values = wide + (ptrdiff_t)low * stride + x;
      F sum = fill(0.0f);
      for (int32_t tap = 0; tap < taps;) {
        F numerator = fill(0.0f), denominator = one;
        const int32_t end = taps - tap < kTapsPerDivision ? taps : tap + kTapsPerDivision;
        for (; tap < end; ++tap, values += tap_floats) {
          F power = multiply_add(load(values + below), lower, load(values) * upper);
          power = power > farthest ? farthest : power;
          power = power < nearest ? nearest : power;
          const F part = one + power_of_two(power);
          numerator = multiply_add(numerator, part, denominator);
          denominator = denominator * part;
        }
        sum = sum + numerator / denominator;
      }
      store(row + x, sum / count);
    }
    write_row(row, out + (ptrdiff_t)y * size, size);
  }
}

// A NaN stays, whatever comes after it.
inline float higher(float peak, float value) { return value > peak || value != value ? value : peak; }

inline int32_t first_of_cell(int32_t cell, int32_t size, int32_t cells) {
  if (cell == 0) return 0;
  return cell == cells ? size : (int32_t)((int64_t)cell * size / cells) + 1;
}

// scratch: width floats, the columns' peaks within a row of cells.
void cell_peaks(const float* map, int32_t height, int32_t width, int32_t cells, float* out, float* columns) {
  for (int32_t i = 0; i < cells; ++i) {
    for (int32_t x = 0; x < width; ++x) columns[x] = -__builtin_inff();
    const int32_t end = first_of_cell(i + 1, height, cells);
    for (int32_t y = first_of_cell(i, height, cells); y < end; ++y) {
      const float* row = map + (ptrdiff_t)y * width;
      for (int32_t x = 0; x < width; ++x) columns[x] = higher(columns[x], row[x]);
    }
    for (int32_t j = 0; j < cells; ++j) {
      const int32_t last = first_of_cell(j + 1, width, cells);
      float peak = -__builtin_inff();
      for (int32_t x = first_of_cell(j, width, cells); x < last; ++x) peak = higher(peak, columns[x]);
      out[i * cells + j] = peak;
    }
  }
}

}  // namespace
