// ggml's block formats as float32, the same operations in the same order as dequantise.py, so the same bits.
#pragma once

namespace {

inline float half_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  return half_to_float(half);
}

inline void q4_k(const uint8_t* block, float* out) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  const uint8_t *packed = block + 4, *values = block + 16;
  for (int j = 0; j < 8; ++j) {
    const int low = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
    const int high = j < 4 ? packed[j + 4] & 63 : (packed[j + 4] >> 4) | (packed[j] >> 6 << 4);
    const float factor = scale * (float)low, offset = minimum * (float)high;
    const uint8_t* bytes = values + 32 * (j / 2);
    for (int k = 0; k < 32; ++k)
      out[32 * j + k] = factor * (float)(j % 2 ? bytes[k] >> 4 : bytes[k] & 15) - offset;
  }
}

inline void q6_k(const uint8_t* block, float* out) {
  const float scale = half_at(block + 208);
  const int8_t* scales = (const int8_t*)block + 192;
  for (int j = 0; j < 8; ++j) {  // 32 values each
    const int half = j / 4, quarter = j % 4;
    const uint8_t *low = block + 64 * half + 32 * (quarter % 2), *high = block + 128 + 32 * half;
    for (int k = 0; k < 32; ++k) {
      const int nibble = quarter < 2 ? low[k] & 15 : low[k] >> 4;
      const int value = (nibble | ((high[k] >> (2 * quarter)) & 3) << 4) - 32;
      out[32 * j + k] = scale * (float)scales[2 * j + k / 16] * (float)value;
    }
  }
}

void dequantise(Rows type, const uint8_t* row, int64_t width, float* out) {
  switch (type) {
    case Rows::F32:
      memcpy(out, row, (size_t)width * 4);
      return;
    case Rows::F16:
      halves_to_floats(row, out, width);
      return;
    case Rows::BF16:
      for (int64_t i = 0; i < width; ++i) {
        uint16_t half;
        memcpy(&half, row + 2 * i, 2);
        const uint32_t bits = (uint32_t)half << 16;
        memcpy(out + i, &bits, 4);
      }
      return;
    case Rows::Q8_0:
      for (; width > 0; width -= 32, row += 34, out += 32) {
        const float scale = half_at(row);
        for (int k = 0; k < 32; ++k) out[k] = (float)(int8_t)row[2 + k] * scale;
      }
      return;
    case Rows::Q4_0:
      for (; width > 0; width -= 32, row += 18, out += 32) {
        const float scale = half_at(row);
        for (int k = 0; k < 16; ++k) {
          out[k] = (float)((row[2 + k] & 15) - 8) * scale;
          out[16 + k] = (float)((row[2 + k] >> 4) - 8) * scale;
        }
      }
      return;
    case Rows::Q4_K:
      for (; width > 0; width -= 256, row += 144, out += 256) q4_k(row, out);
      return;
    case Rows::Q6_K:
      for (; width > 0; width -= 256, row += 210, out += 256) q6_k(row, out);
      return;
  }
}

}  // namespace
