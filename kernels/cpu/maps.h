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

// [side][side] → [side][row_floats(size)].
inline void across(const float* grid, int32_t side, int32_t size, float* out) {
  const int32_t stride = row_floats(size), right = side > 1 ? 1 : 0;
  for (int32_t x = 0; x < size; ++x) {
    int32_t low;
    float share;
    place(x, side, size, &low, &share);
    for (int32_t row = 0; row < side; ++row) {
      const float* values = grid + row * side + low;
      out[(ptrdiff_t)row * stride + x] = values[0] * (1 - share) + values[right] * share;
    }
  }
  for (int32_t row = 0; row < side; ++row)
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
  across(grid, side, size, wide);
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

// 1 / (1 + e**-x): exponent from the integer part of -x / ln 2, the rest by a polynomial of degree 6 (Cephes).
inline F sigmoid(F x) {
  F power = -x;
  const F highest = fill(88.0f), lowest = fill(-87.0f);
  power = power > highest ? highest : power;
  power = power < lowest ? lowest : power;
  const F magic = fill(12582912.0f);  // 1.5 × 2**23: rounds to an integer
  const F whole = (power * fill(1.44269504f) + magic) - magic;
  F rest = power - whole * fill(0.693359375f);
  rest = rest - whole * fill(-2.12194440e-4f);
  F value = fill(1.9875691500e-4f);
  value = value * rest + fill(1.3981999507e-3f);
  value = value * rest + fill(8.3334519073e-3f);
  value = value * rest + fill(4.1665795894e-2f);
  value = value * rest + fill(1.6666665459e-1f);
  value = value * rest + fill(5.0000001201e-1f);
  value = value * rest * rest + rest + fill(1.0f);
  const I exponent = (__builtin_convertvector(whole, I) + 127) << 23;
  F scale;
  memcpy(&scale, &exponent, sizeof scale);
  return fill(1.0f) / (fill(1.0f) + value * scale);
}

// differences: [taps][side × side] of one image; scratch: (taps × side + 1) × row_floats(size).
void localise(const float* differences, int32_t taps, int32_t side, float* out, int32_t size, int32_t first,
              int32_t last, float* scratch) {
  if (!all_finite(differences, (int64_t)taps * side * side)) return write_nan(out, size, first, last);
  const int32_t stride = row_floats(size), below = side > 1 ? stride : 0;
  const ptrdiff_t tap_floats = (ptrdiff_t)side * stride;
  float *wide = scratch, *row = scratch + taps * tap_floats;
  for (int32_t tap = 0; tap < taps; ++tap)
    across(differences + (ptrdiff_t)tap * side * side, side, size, wide + tap * tap_floats);
  for (int32_t y = first; y < last; ++y) {
    int32_t low;
    float share;
    place(y, side, size, &low, &share);
    for (int32_t x = 0; x < stride; x += kLanes) {
      F sum = fill(0.0f);
      for (int32_t tap = 0; tap < taps; ++tap) {
        const float* values = wide + tap * tap_floats + (ptrdiff_t)low * stride + x;
        sum = sum + sigmoid(load(values) * fill(1 - share) + load(values + below) * fill(share));
      }
      store(row + x, sum / fill((float)taps));
    }
    write_row(row, out + (ptrdiff_t)y * size, size);
  }
}

}  // namespace
