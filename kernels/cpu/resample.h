// Resampling: both passes of Pillow's filter are the same step on blocks of 64 bytes, [4 rows or columns][4
// channels][4 inputs], one block after the other. A weight of 1 / 2**22 does not fit the byte and 16-bit products
// that are fast, so it is split into digits whose sums are put together again, modulo 2**32 and so exactly.
#pragma once

namespace {

constexpr int kBlockBytes = 64;

inline uint8_t to_level(uint32_t sum) {
  const int32_t level = (int32_t)(sum + (1u << 21)) >> 22;
  return (uint8_t)(level < 0 ? 0 : level > 255 ? 255 : level);
}

#if defined(__AVX512VNNI__)

constexpr int kWeightBytes = 12;  // three signed bytes of each of four weights

void pack_weights(const int32_t* weights, uint8_t* packed) {
  for (int k = 0; k < 4; ++k) {
    int32_t rest = weights[k];
    for (int digit = 0; digit < 3; ++digit) {
      const int8_t low = (int8_t)(rest & 255);
      packed[4 * digit + k] = (uint8_t)low;
      rest = (rest - low) >> 8;
    }
  }
}

inline int32_t digit_of(const uint8_t* weights, int digit) {
  int32_t bits;
  memcpy(&bits, weights + 4 * digit, 4);
  return bits;
}

// Out: 16 levels, [channel][4 rows or columns].
inline void filter(const uint8_t* blocks, ptrdiff_t stride, const uint8_t* weights, int count, uint8_t* out) {
  __m512i low = _mm512_setzero_si512(), middle = low, high = low;
  for (int block = 0; block < count; ++block, blocks += stride, weights += kWeightBytes) {
    const __m512i pixels = _mm512_loadu_si512(blocks);
    low = _mm512_dpbusd_epi32(low, pixels, _mm512_set1_epi32(digit_of(weights, 0)));
    middle = _mm512_dpbusd_epi32(middle, pixels, _mm512_set1_epi32(digit_of(weights, 1)));
    high = _mm512_dpbusd_epi32(high, pixels, _mm512_set1_epi32(digit_of(weights, 2)));
  }
  __m512i sum = _mm512_add_epi32(low, _mm512_add_epi32(_mm512_slli_epi32(middle, 8), _mm512_slli_epi32(high, 16)));
  sum = _mm512_srai_epi32(_mm512_add_epi32(sum, _mm512_set1_epi32(1 << 21)), 22);
  const __m128i levels = _mm512_cvtusepi32_epi8(_mm512_max_epi32(sum, _mm512_setzero_si512()));
  const __m128i by_channel = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(levels, by_channel));
}

#else

constexpr int kWeightBytes = 16;  // the low 11 bits of four weights, unsigned, then what is above, 16 bits each

void pack_weights(const int32_t* weights, uint8_t* packed) {
  for (int k = 0; k < 4; ++k) {
    const int16_t low = (int16_t)(weights[k] & 2047), high = (int16_t)(weights[k] >> 11);
    memcpy(packed + 2 * k, &low, 2);
    memcpy(packed + 8 + 2 * k, &high, 2);
  }
}

#if defined(__AVX2__)

inline __m256i four_times(const uint8_t* p) {
  int64_t bits;
  memcpy(&bits, p, 8);
  return _mm256_set1_epi64x(bits);
}

inline void filter(const uint8_t* blocks, ptrdiff_t stride, const uint8_t* weights, int count, uint8_t* out) {
  __m256i low[4] = {}, high[4] = {};
  for (int block = 0; block < count; ++block, blocks += stride, weights += kWeightBytes) {
    const __m256i low_weights = four_times(weights), high_weights = four_times(weights + 8);
    for (int i = 0; i < 4; ++i) {
      const __m256i pixels = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(blocks + 16 * i)));
      low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pixels, low_weights));
      high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pixels, high_weights));
    }
  }
  for (int i = 0; i < 4; ++i) low[i] = _mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], 11));
  const __m256i half = _mm256_set1_epi32(1 << 21);
  const __m256i first = _mm256_srai_epi32(_mm256_add_epi32(_mm256_hadd_epi32(low[0], low[1]), half), 22);
  const __m256i second = _mm256_srai_epi32(_mm256_add_epi32(_mm256_hadd_epi32(low[2], low[3]), half), 22);
  const __m256i words = _mm256_packs_epi32(first, second);  // [channels 0 1][i] in one lane, [2 3] in the other
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i by_channel = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
  _mm_storel_epi64((__m128i*)out, _mm_shuffle_epi8(_mm256_castsi256_si128(bytes), by_channel));
  _mm_storel_epi64((__m128i*)(out + 8), _mm_shuffle_epi8(_mm256_extracti128_si256(bytes, 1), by_channel));
}

#elif defined(__ARM_NEON)

inline void filter(const uint8_t* blocks, ptrdiff_t stride, const uint8_t* weights, int count, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    int32x4_t low[3] = {}, high[3] = {};
    const uint8_t *block = blocks + 16 * i, *weight = weights;
    for (int step = 0; step < count; ++step, block += stride, weight += kWeightBytes) {
      const int16x4_t low_weights = vreinterpret_s16_u8(vld1_u8(weight));
      const int16x4_t high_weights = vreinterpret_s16_u8(vld1_u8(weight + 8));
      const uint8x16_t pixels = vld1q_u8(block);
      const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(pixels)));
      const int16x8_t second = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(pixels)));
      const int16x4_t channel[3] = {vget_low_s16(first), vget_high_s16(first), vget_low_s16(second)};
      for (int c = 0; c < 3; ++c) {
        low[c] = vmlal_s16(low[c], channel[c], low_weights);
        high[c] = vmlal_s16(high[c], channel[c], high_weights);
      }
    }
    for (int c = 0; c < 3; ++c)
      out[4 * c + i] = to_level((uint32_t)vaddvq_s32(vaddq_s32(low[c], vshlq_n_s32(high[c], 11))));
    out[12 + i] = 0;
  }
}

#else

inline void filter(const uint8_t* blocks, ptrdiff_t stride, const uint8_t* weights, int count, uint8_t* out) {
  uint32_t sums[16] = {};  // [4 rows or columns][channel]
  for (int block = 0; block < count; ++block, blocks += stride, weights += kWeightBytes) {
    int16_t digits[8];
    memcpy(digits, weights, 16);
    for (int k = 0; k < 4; ++k) {
      const uint32_t weight = (uint32_t)(int32_t)digits[k] + ((uint32_t)(int32_t)digits[4 + k] << 11);
      for (int sum = 0; sum < 16; ++sum) sums[sum] += weight * blocks[4 * sum + k];
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int c = 0; c < 4; ++c) out[4 * c + i] = to_level(sums[4 * i + c]);
}

#endif
#endif

// -- from a camera's pixels to blocks -----------------------------------------------------------------------------------

inline uint32_t pack_rgb(int32_t red, int32_t green, int32_t blue) {
  return (uint32_t)red | (uint32_t)green << 8 | (uint32_t)blue << 16;
}

inline int32_t clamp_level(int32_t x) { return x < 0 ? 0 : x > 255 ? 255 : x; }

// OpenCV's BT.601 studio range in 1 / 2**20.
inline uint32_t yuv_to_rgb(int32_t y, int32_t u, int32_t v) {
  const int32_t luma = (y > 16 ? y - 16 : 0) * 1220542 + (1 << 19);
  u -= 128, v -= 128;
  return pack_rgb(clamp_level((luma + 1673527 * v) >> 20), clamp_level((luma - 852492 * v - 409993 * u) >> 20),
                  clamp_level((luma + 2116026 * u) >> 20));
}

// One row of YUV, a pair of pixels at a time; `chroma` points at the pair's U, V lies `chroma_v` further.
inline void yuv_row(const uint8_t* luma, ptrdiff_t luma_step, const uint8_t* chroma, ptrdiff_t chroma_v,
                    ptrdiff_t chroma_step, int32_t x, int32_t count, uint32_t* out) {
  int32_t i = 0;
  if (x & 1 && count > 0) {
    const uint8_t* pair = chroma + (x >> 1) * chroma_step;
    out[i++] = yuv_to_rgb(luma[x * luma_step], pair[0], pair[chroma_v]);
  }
  for (; i + 1 < count; i += 2) {
    const uint8_t* pair = chroma + ((x + i) >> 1) * chroma_step;
    const uint8_t* two = luma + (x + i) * luma_step;
    out[i] = yuv_to_rgb(two[0], pair[0], pair[chroma_v]);
    out[i + 1] = yuv_to_rgb(two[luma_step], pair[0], pair[chroma_v]);
  }
  if (i < count) {
    const uint8_t* pair = chroma + ((x + i) >> 1) * chroma_step;
    out[i] = yuv_to_rgb(luma[(x + i) * luma_step], pair[0], pair[chroma_v]);
  }
}

// Bilinear demosaicing; even rows hold R G R G, odd rows G B G B; the outermost pixels repeat their neighbours.
inline void bayer_row(const Frame& frame, int32_t y, int32_t x, int32_t count, uint32_t* out) {
  const int32_t inner_y = y < 1 ? 1 : y > frame.height - 2 ? frame.height - 2 : y;
  const uint8_t* middle = frame.pixels + inner_y * frame.row;
  const uint8_t *above = middle - frame.row, *below = middle + frame.row;
  const ptrdiff_t step = frame.column;
  const bool red_row = inner_y % 2 == 0;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t column = x + i;
    const int32_t inner = column < 1 ? 1 : column > frame.width - 2 ? frame.width - 2 : column;
    const ptrdiff_t here = inner * step;
    const int32_t own = middle[here], left = middle[here - step], right = middle[here + step];
    const int32_t up = above[here], down = below[here];
    const int32_t across = (left + right + 1) >> 1, along = (up + down + 1) >> 1;
    const int32_t cross = (left + right + up + down + 2) >> 2;
    const int32_t corners =
        (above[here - step] + above[here + step] + below[here - step] + below[here + step] + 2) >> 2;
    const bool even = inner % 2 == 0;
    const int32_t green = red_row == even ? cross : own;
    const int32_t first = red_row ? (even ? own : across) : (even ? along : corners);   // red
    const int32_t third = red_row ? (even ? corners : along) : (even ? across : own);   // blue
    out[i] = pack_rgb(first, green, third);
  }
}

// `count` pixels from (x, y) as R | G << 8 | B << 16.
void convert(const Frame& frame, int32_t y, int32_t x, int32_t count, uint32_t* out) {
  const uint8_t* row = frame.pixels + y * frame.row;
  const ptrdiff_t step = frame.column;
  switch (frame.format) {
    case Format::BGR8:
    case Format::RGB8: {
      const ptrdiff_t red = frame.format == Format::RGB8 ? 0 : 2 * frame.channel, blue = 2 * frame.channel - red;
      for (int32_t i = 0; i < count; ++i) {
        const uint8_t* p = row + (x + i) * step;
        out[i] = pack_rgb(p[red], p[frame.channel], p[blue]);
      }
      return;
    }
    case Format::Mono8:
      for (int32_t i = 0; i < count; ++i) out[i] = row[(x + i) * step] * 0x010101u;
      return;
    case Format::NV12: {
      const uint8_t* chroma = frame.pixels + (frame.height + y / 2) * frame.row;
      yuv_row(row, step, chroma, step, 2 * step, x, count, out);
      return;
    }
    case Format::YUYV:
      yuv_row(row, step, row + frame.channel, step, 2 * step, x, count, out);
      return;
    case Format::BayerRG8:
      bayer_row(frame, y, x, count, out);
      return;
  }
}

// One row of a rotated box, bilinear from the converted canvas; the frame's edge repeats.
void rotated_row(const Cut& cut, int32_t v, int32_t u, int32_t count, uint32_t* out) {
  const int64_t* r = cut.rotation;
  const int32_t right = cut.frame.width - 1, bottom = cut.frame.height - 1;
  int64_t x = r[0] * u + r[1] * v + r[2] + (1 << 23), y = r[3] * u + r[4] * v + r[5] + (1 << 23);
  for (int32_t i = 0; i < count; ++i, x += r[0], y += r[3]) {
    const int64_t fine_x = x >> 24, fine_y = y >> 24;
    const int64_t left = fine_x >> 8, top = fine_y >> 8;
    const int64_t x0 = left < 0 ? 0 : left > right ? right : left;
    const int64_t x1 = left + 1 < 0 ? 0 : left + 1 > right ? right : left + 1;
    const int64_t y0 = top < 0 ? 0 : top > bottom ? bottom : top;
    const int64_t y1 = top + 1 < 0 ? 0 : top + 1 > bottom ? bottom : top + 1;
    const uint64_t wx = (uint64_t)(fine_x & 255), wy = (uint64_t)(fine_y & 255);
    const uint32_t* above = cut.canvas + (y0 - cut.canvas_y) * cut.canvas_width - cut.canvas_x;
    const uint32_t* below = cut.canvas + (y1 - cut.canvas_y) * cut.canvas_width - cut.canvas_x;
    const uint32_t corner[4] = {above[x0], above[x1], below[x0], below[x1]};
    const uint64_t weight[4] = {(256 - wx) * (256 - wy), wx * (256 - wy), (256 - wx) * wy, wx * wy};
    uint64_t red_blue = (1u << 15) | (uint64_t)(1u << 15) << 32, green = 1u << 15;
    for (int k = 0; k < 4; ++k) {
      red_blue += weight[k] * ((corner[k] & 255) | (uint64_t)(corner[k] >> 16 & 255) << 32);
      green += weight[k] * (corner[k] >> 8 & 255);
    }
    out[i] = pack_rgb((int32_t)(red_blue >> 16 & 255), (int32_t)(green >> 16), (int32_t)(red_blue >> 48 & 255));
  }
}

// Four pixels, `step` 3 or 4 bytes each, to [channel][4]; order says which byte is red, green, blue.
struct Spread {
  uint8_t index[16];
};

inline Spread spread_of(int step, int red, int blue) {
  Spread spread;
  const int channel[3] = {red, 1, blue};
  for (int c = 0; c < 3; ++c)
    for (int k = 0; k < 4; ++k) spread.index[4 * c + k] = (uint8_t)(step * k + channel[c]);
  for (int k = 0; k < 4; ++k) spread.index[12 + k] = 0x80;
  return spread;
}

inline void spread_block(const uint8_t* pixels, const Spread& spread, uint8_t* out) {
#if defined(__AVX2__)
  const __m128i index = _mm_loadu_si128((const __m128i*)spread.index);
  _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)pixels), index));
#elif defined(__ARM_NEON)
  vst1q_u8(out, vqtbl1q_u8(vld1q_u8(pixels), vld1q_u8(spread.index)));
#else
  for (int i = 0; i < 12; ++i) out[i] = pixels[spread.index[i]];
  for (int i = 12; i < 16; ++i) out[i] = 0;
#endif
}

// Blocks [first, last) of one row of a box into every fourth place of `out`, [block][4 rows][16].
void spread_row(const Cut& cut, int32_t row, int32_t first, int32_t last, uint8_t* out, uint32_t* pixels) {
  const Frame& frame = cut.frame;
  const int32_t begin = 4 * first;
  const int32_t end = 4 * last < cut.width ? 4 * last : cut.width;
  const bool packed = !cut.rotated && (frame.format == Format::BGR8 || frame.format == Format::RGB8) &&
                      frame.column == 3 && frame.channel == 1;
  const uint8_t* bytes;
  ptrdiff_t available;
  int step;
  if (packed) {
    step = 3;
    bytes = frame.pixels + (cut.y + row) * frame.row + (ptrdiff_t)(cut.x + begin) * 3;
    available = (ptrdiff_t)(frame.width - cut.x - begin) * 3;
  } else {
    step = 4;
    if (cut.rotated)
      rotated_row(cut, row, begin, end - begin, pixels);
    else
      convert(frame, cut.y + row, cut.x + begin, end - begin, pixels);
    bytes = (const uint8_t*)pixels;
    available = (ptrdiff_t)(end - begin) * 4;
  }
  const bool red_first = !packed || frame.format == Format::RGB8;
  const Spread spread = spread_of(step, red_first ? 0 : 2, red_first ? 2 : 0);
  int32_t block = first;
  for (; block < last && available >= 16; ++block, bytes += 4 * step, available -= 4 * step, out += kBlockBytes)
    spread_block(bytes, spread, out);
  for (; block < last; ++block, bytes += 4 * step, available -= 4 * step, out += kBlockBytes) {
    uint8_t tail[16] = {};  // the row ends within these 16 bytes: nothing behind it is read
    if (available > 0) memcpy(tail, bytes, available < 16 ? available : 16);
    spread_block(tail, spread, out);
  }
}

// -- the passes -----------------------------------------------------------------------------------------------------------

size_t columns_scratch(const Cut& cut) {
  const size_t blocks = (size_t)(cut.across.end + 3) / 4 - cut.across.begin / 4 + cut.across.blocks;
  return blocks * kBlockBytes + (size_t)(cut.width + 8) * 4;
}

void columns(const Cut& cut, int32_t first, int32_t last, uint8_t* scratch) {
  const Filter& across = cut.across;
  const int32_t left = across.begin / 4, right = (across.end + 3) / 4;
  uint8_t* blocks = scratch;
  uint32_t* pixels = (uint32_t*)(scratch + (size_t)(right - left + across.blocks) * kBlockBytes);
  const int32_t top = cut.down.begin / 4;
  for (int32_t group = first; group < last; ++group) {
    for (int32_t r = 0; r < 4; ++r) {
      const int32_t row = 4 * (top + group) + r;
      if (row < cut.height) spread_row(cut, row, left, right, blocks + 16 * r, pixels);
    }
    uint8_t* out = cut.narrow + group * cut.narrow_stride;
    const uint8_t* weights = across.weights;
    for (int32_t x = 0; x < across.outputs; ++x, out += 16, weights += (size_t)across.blocks * kWeightBytes)
      filter(blocks + (ptrdiff_t)(across.first[x] - left) * kBlockBytes, kBlockBytes, weights, across.blocks, out);
  }
}

template <typename Value>
void rows_of(const Cut& cut, int32_t first, int32_t last) {
  const Filter& down = cut.down;
  const int32_t size = cut.across.outputs, top = down.begin / 4;
  const Value* table = (const Value*)cut.table;
  for (int32_t y = first; y < last; ++y) {
    const uint8_t* blocks = cut.narrow + (down.first[y] - top) * cut.narrow_stride;
    const uint8_t* weights = down.weights + (size_t)y * down.blocks * kWeightBytes;
    for (int32_t x = 0; x < size; x += 4, blocks += kBlockBytes) {
      uint8_t levels[16];
      filter(blocks, cut.narrow_stride, weights, down.blocks, levels);
      const int32_t count = size - x < 4 ? size - x : 4;
      for (int c = 0; c < 3; ++c) {
        Value* out = (Value*)cut.out + ((ptrdiff_t)c * down.outputs + y) * size + x;
        for (int32_t i = 0; i < count; ++i) out[i] = table[256 * c + levels[4 * c + i]];
      }
    }
  }
}

void rows(const Cut& cut, int32_t first, int32_t last) {
  if (cut.out_bytes == 4)
    rows_of<uint32_t>(cut, first, last);
  else
    rows_of<uint16_t>(cut, first, last);
}

}  // namespace
