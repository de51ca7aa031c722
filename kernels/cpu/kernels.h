// What every instruction-set level offers. One source, level.cpp, is compiled once a level with the compiler's
// flags for it; the table it fills is picked at run time. Nothing here allocates, throws or includes a standard
// template: an inline function compiled for AVX-512 must never be the copy that a machine without it runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace agpt {

enum class Format : int32_t { BGR8, RGB8, Mono8, NV12, YUYV, BayerRG8 };
enum class Storage : int32_t { F32, F16, I8 };
enum class Rows : int32_t { F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q6_K };

// A camera's frame as it lies in memory; strides in bytes.
struct Frame {
  const uint8_t* pixels;
  ptrdiff_t row, column, channel;
  int32_t height, width;
  Format format;
};

// One pass of the resampling filter (sampling.Taps), packed for a level: inputs in blocks of four.
struct Filter {
  int32_t outputs;
  int32_t blocks;         // read for each output
  const int32_t* first;   // [outputs] first block of each
  const uint8_t* weights; // [outputs][blocks][weight_bytes]
  int32_t begin, end;     // inputs that are read: [begin, end)
};

// One box of a frame on its way to the network's square.
struct Cut {
  Frame frame;
  int32_t x, y, width, height;
  bool rotated;
  int64_t rotation[6];      // sampling.Sampling.rotation
  const uint32_t* canvas;   // rotated: the frame around the box, converted; pixels R | G << 8 | B << 16
  int32_t canvas_x, canvas_y, canvas_width, canvas_height;
  Filter across, down;
  uint8_t* narrow;          // after the horizontal pass: [row blocks][columns][channel][4 rows], 64-byte multiples
  ptrdiff_t narrow_stride;  // bytes from a row block to the next
  const void* table;        // [3][256] of the output's type
  void* out;                // [3][S][S]
  int32_t out_bytes;        // of one value: 4 or 2
};

// One bank, one tap, packed for a level.
struct Panels {
  Storage storage;
  int32_t rows, width;      // N, V
  int32_t count, depth;     // panels; steps of the inner loop
  const uint8_t* values;    // [count][depth][lanes of a panel]
  const float* scales;      // [count][lanes]: int8 only
  const float* bias;        // [count][lanes]: 0, -inf where a lane has no row
  const int32_t* start;     // [count][lanes]: int8 only, what the sums start from
};

struct MatchTask {
  Panels panels;
  const float* queries;     // [num_queries][V]
  int32_t num_queries;
  float* similarity;        // [num_queries]
  int32_t* nearest;         // [num_queries]
};

// One row of the grid of one tap: patches of the references against the part's patches around the same places.
struct PlacesTask {
  const float* rows;         // packed rows of the part that are in reach, the first of num_rows
  int32_t num_rows, side, width, radius, stride;
  const float* reference;    // [side][width] of the first reference
  ptrdiff_t reference_step;  // floats to the next reference
  int32_t count;             // references
  float* out;                // [side] of the first reference
  ptrdiff_t out_step;
};

struct Kernels {
  const char* name;
  // Resampling.
  int32_t weight_bytes;     // of one output's weights for one block
  void (*pack_weights)(const int32_t* weights, uint8_t* packed);  // 4 integers of 1 / 2**22
  size_t (*columns_scratch)(const Cut& cut);
  void (*columns)(const Cut& cut, int32_t first, int32_t last, uint8_t* scratch);  // row blocks [first, last)
  void (*rows)(const Cut& cut, int32_t first, int32_t last);                        // output rows [first, last)
  void (*convert)(const Frame& frame, int32_t y, int32_t x, int32_t count, uint32_t* out);
  // Matching.
  int32_t lanes;            // rows of the bank in a panel
  int32_t group;            // int8 values that one step multiplies
  int32_t offset;           // added to int8 queries, so that they are unsigned
  size_t (*match_scratch)(const Panels& panels, int32_t num_queries);
  void (*match)(const MatchTask& task, uint8_t* scratch);
  void (*dots)(const float* rows, int32_t num_rows, int32_t width, const float* vector, float* out);
  int32_t (*places_stride)(int32_t side, int32_t radius);
  void (*pack_places)(const float* patches, int32_t side, int32_t width, int32_t radius, float* packed,
                      uint8_t* finite);
  void (*match_places)(const PlacesTask& task);
  // Maps.
  void (*upsample)(const float* grid, int32_t side, float* out, int32_t size, int32_t first, int32_t last,
                   float* scratch);
  void (*localise)(const float* differences, int32_t taps, int32_t side, float* out, int32_t size, int32_t first,
                   int32_t last, float* scratch);
  void (*cell_peaks)(const float* map, int32_t height, int32_t width, int32_t cells, float* out, float* scratch);
  // Prompt.
  void (*dequantise)(Rows type, const uint8_t* row, int64_t width, float* out);
};

const Kernels* baseline_kernels();
#ifdef WITH_AVX2
const Kernels* avx2_kernels();
#endif
#ifdef WITH_AVX512
const Kernels* avx512_kernels();
#endif
#ifdef WITH_VNNI
const Kernels* vnni_kernels();
#endif
#ifdef WITH_NEONDOT
const Kernels* neondot_kernels();
#endif

}  // namespace agpt
