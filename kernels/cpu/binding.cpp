// The Python module: arrays that the public functions have checked, to pointers; tasks to threads; the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "frames.h"
#include "kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace agpt {
namespace {

// -- levels ------------------------------------------------------------------------------------------------------------------

std::vector<const Kernels*> find_levels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef WITH_VNNI
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(vnni_kernels());
#endif
#ifdef WITH_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(avx512_kernels());
#endif
#ifdef WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2_kernels());
#endif
#elif defined(__aarch64__) && defined(__linux__) && defined(WITH_NEONDOT)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(neondot_kernels());
#endif
  found.push_back(baseline_kernels());
  return found;
}

const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> found = find_levels();
  return found;
}

const Kernels& level(const std::string& name) {
  for (const Kernels* kernels : levels())
    if (name == kernels->name) return *kernels;
  throw std::invalid_argument("this machine does not run the level " + name);
}

// -- memory ------------------------------------------------------------------------------------------------------------------

// Memory of one calling thread: grows to the largest size asked for, then stays. 64-byte aligned.
class Scratch {
 public:
  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64))));
      size_ = bytes;
      std::memset(memory_.get(), 0, bytes);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0;
};

Scratch& scratch() {
  thread_local Scratch own;
  return own;
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename T>
const T* data(const py::array& array) {
  return static_cast<const T*>(array.data());
}

template <typename T>
T* mutable_data(py::array& array) {
  return static_cast<T*>(array.mutable_data());
}

int32_t size32(py::ssize_t size) {
  if (size < 0 || size > INT32_MAX) throw std::invalid_argument("an array is too large");
  return static_cast<int32_t>(size);
}

// -- preprocess ----------------------------------------------------------------------------------------------------------------

// sampling.Taps in blocks of four inputs, each output's weights as the level multiplies them.
class PackedFilter {
 public:
  PackedFilter(const std::string& name, const py::array& starts, const py::array& counts, const py::array& weights) {
    const Kernels& kernels = level(name);
    const int32_t* start = data<int32_t>(starts);
    const int32_t* count = data<int32_t>(counts);
    const int32_t outputs = size32(starts.size()), stride = size32(weights.shape(1));
    int32_t blocks = 1;
    view_.begin = start[0], view_.end = 0;
    for (int32_t i = 0; i < outputs; ++i) {
      blocks = std::max(blocks, (start[i] + count[i] + 3) / 4 - start[i] / 4);
      view_.begin = std::min(view_.begin, start[i]);
      view_.end = std::max(view_.end, start[i] + count[i]);
    }
    first_.resize(outputs);
    packed_.resize((size_t)outputs * blocks * kernels.weight_bytes);
    std::vector<int32_t> row(4 * (size_t)blocks);
    for (int32_t i = 0; i < outputs; ++i) {
      first_[i] = start[i] / 4;
      std::fill(row.begin(), row.end(), 0);
      for (int32_t k = 0; k < count[i]; ++k) row[start[i] % 4 + k] = data<int32_t>(weights)[(size_t)i * stride + k];
      for (int32_t block = 0; block < blocks; ++block)
        kernels.pack_weights(&row[4 * (size_t)block], &packed_[((size_t)i * blocks + block) * kernels.weight_bytes]);
    }
    view_.outputs = outputs, view_.blocks = blocks, view_.first = first_.data(), view_.weights = packed_.data();
  }

  const Filter& view() const { return view_; }

 private:
  Filter view_{};
  std::vector<int32_t> first_;
  std::vector<uint8_t> packed_;
};

Frame frame_of(const py::array& pixels, int32_t format) {
  Frame frame{};
  frame.pixels = data<uint8_t>(pixels);
  frame.format = static_cast<Format>(format);
  frame.row = pixels.strides(0), frame.column = pixels.strides(1);
  frame.channel = pixels.ndim() == 3 ? pixels.strides(2) : 0;
  frame.height = size32(pixels.shape(0)), frame.width = size32(pixels.shape(1));
  if (frame.format == Format::NV12) frame.height = frame.height / 3 * 2;
  return frame;
}

// The part of a frame that a rotated box reads.
void place_canvas(Cut& cut) {
  const int64_t* r = cut.rotation;
  int64_t left = INT64_MAX, top = INT64_MAX, right = INT64_MIN, bottom = INT64_MIN;
  for (int64_t u : {0, cut.width - 1})
    for (int64_t v : {0, cut.height - 1}) {
      const int64_t x = (r[0] * u + r[1] * v + r[2]) >> 32, y = (r[3] * u + r[4] * v + r[5]) >> 32;
      left = std::min(left, x - 1), right = std::max(right, x + 2);
      top = std::min(top, y - 1), bottom = std::max(bottom, y + 2);
    }
  const auto clamp = [](int64_t value, int32_t size) {
    return (int32_t)std::min<int64_t>(std::max<int64_t>(value, 0), size - 1);
  };
  cut.canvas_x = clamp(left, cut.frame.width), cut.canvas_y = clamp(top, cut.frame.height);
  cut.canvas_width = clamp(right, cut.frame.width) - cut.canvas_x + 1;
  cut.canvas_height = clamp(bottom, cut.frame.height) - cut.canvas_y + 1;
}

constexpr int32_t kGroupsPerTask = 8, kRowsPerTask = 16;

int32_t tasks_of(int32_t count, int32_t each) { return (count + each - 1) / each; }

struct Sizes {
  size_t canvas, narrow, columns;
};

Sizes sizes_of(const Kernels& kernels, const Cut& cut) {
  const size_t groups = (size_t)(cut.down.end + 3) / 4 - cut.down.begin / 4 + cut.down.blocks;
  return {cut.rotated ? padded((size_t)cut.canvas_width * cut.canvas_height * 4) : 0,
          padded(groups * cut.narrow_stride), padded(kernels.columns_scratch(cut))};
}

void fill_canvas(const Kernels& kernels, const Cut& cut, int32_t row, uint32_t* canvas) {
  kernels.convert(cut.frame, cut.canvas_y + row, cut.canvas_x, cut.canvas_width,
                  canvas + (size_t)row * cut.canvas_width);
}

void preprocess(const std::string& name, const py::array& pixels, int32_t format, const py::list& boxes,
                const py::list& filters, const py::array& table, py::array& out, int32_t threads) {
  const Kernels& kernels = level(name);
  thread_local std::vector<Cut> cuts;  // keeps its memory from call to call
  cuts.resize(boxes.size());
  const size_t value_bytes = out.itemsize(), square = out.size() / std::max<size_t>(cuts.size(), 1);
  uint8_t* out_bytes = mutable_data<uint8_t>(out);
  for (size_t i = 0; i < cuts.size(); ++i) {
    Cut& cut = cuts[i];
    cut = Cut{};
    cut.frame = frame_of(pixels, format);
    const auto box = boxes[i].cast<py::tuple>();  // x, y, width, height, rotation or None
    cut.x = box[0].cast<int32_t>(), cut.y = box[1].cast<int32_t>();
    cut.width = box[2].cast<int32_t>(), cut.height = box[3].cast<int32_t>();
    cut.rotated = !box[4].is_none();
    if (cut.rotated) {
      std::memcpy(cut.rotation, data<int64_t>(box[4].cast<py::array>()), sizeof cut.rotation);
      place_canvas(cut);
    }
    const auto pair = filters[i].cast<py::tuple>();
    cut.across = pair[0].cast<const PackedFilter&>().view();
    cut.down = pair[1].cast<const PackedFilter&>().view();
    cut.narrow_stride = (ptrdiff_t)padded((size_t)cut.across.outputs * 16);
    cut.table = table.data();
    cut.out = out_bytes + i * square * value_bytes;
    cut.out_bytes = (int32_t)value_bytes;
  }
  py::gil_scoped_release release;
  threads = std::max(threads, 1);
  Sizes most{};
  for (const Cut& cut : cuts) {
    const Sizes sizes = sizes_of(kernels, cut);
    most = {std::max(most.canvas, sizes.canvas), std::max(most.narrow, sizes.narrow),
            std::max(most.columns, sizes.columns)};
  }
  const auto groups_of = [](const Cut& cut) { return (cut.down.end + 3) / 4 - cut.down.begin / 4; };
  if (threads == 1 || (int32_t)cuts.size() >= 2 * threads) {  // a box a thread
    const size_t each = most.canvas + most.narrow + most.columns;
    uint8_t* memory = scratch().get(each * threads);
    const Cut* all = cuts.data();  // `cuts` is another variable in each thread
    parallel((int32_t)cuts.size(), threads, [&, all](int32_t index, int32_t slot) {
      Cut cut = all[index];
      uint8_t* own = memory + slot * each;
      uint32_t* canvas = (uint32_t*)own;
      cut.canvas = canvas;
      cut.narrow = own + most.canvas;
      if (cut.rotated)
        for (int32_t row = 0; row < cut.canvas_height; ++row) fill_canvas(kernels, cut, row, canvas);
      kernels.columns(cut, 0, groups_of(cut), own + most.canvas + most.narrow);
      kernels.rows(cut, 0, cut.down.outputs);
    });
    return;
  }
  uint8_t* memory = scratch().get(most.canvas + most.narrow + most.columns * threads);
  uint32_t* canvas = (uint32_t*)memory;
  for (Cut& cut : cuts) {  // a box after the other, each by all threads
    cut.canvas = canvas;
    cut.narrow = memory + most.canvas;
    if (cut.rotated)
      parallel(tasks_of(cut.canvas_height, kRowsPerTask), threads, [&](int32_t task, int32_t) {
        const int32_t last = std::min((task + 1) * kRowsPerTask, cut.canvas_height);
        for (int32_t row = task * kRowsPerTask; row < last; ++row) fill_canvas(kernels, cut, row, canvas);
      });
    const int32_t groups = groups_of(cut);
    parallel(tasks_of(groups, kGroupsPerTask), threads, [&](int32_t task, int32_t slot) {
      kernels.columns(cut, task * kGroupsPerTask, std::min((task + 1) * kGroupsPerTask, groups),
                      memory + most.canvas + most.narrow + slot * most.columns);
    });
    parallel(tasks_of(cut.down.outputs, kRowsPerTask), threads, [&](int32_t task, int32_t) {
      kernels.rows(cut, task * kRowsPerTask, std::min((task + 1) * kRowsPerTask, cut.down.outputs));
    });
  }
}

// -- match ---------------------------------------------------------------------------------------------------------------------

// A bank's rows in panels: for every step of the inner loop the values of kernels.lanes rows lie side by side.
class PackedBank {
 public:
  PackedBank(const std::string& name, const py::array& rows, const py::array& scales) : kernels_(level(name)) {
    const int32_t taps = size32(rows.shape(0)), num_rows = size32(rows.shape(1)), width = size32(rows.shape(2));
    const Storage storage = rows.itemsize() == 4 ? Storage::F32 : rows.itemsize() == 2 ? Storage::F16 : Storage::I8;
    const int32_t lanes = kernels_.lanes, group = storage == Storage::I8 ? kernels_.group : 1;
    const int32_t depth = (width + group - 1) / group, count = (num_rows + lanes - 1) / lanes;
    const size_t item = rows.itemsize(), tap_bytes = (size_t)count * depth * lanes * group * item;
    const size_t tap_lanes = (size_t)count * lanes;
    values_.reset(static_cast<uint8_t*>(::operator new(taps * tap_bytes, std::align_val_t(64))));
    std::memset(values_.get(), 0, taps * tap_bytes);
    scales_.assign(taps * tap_lanes, 0.0f);
    bias_.assign(taps * tap_lanes, -INFINITY);
    start_.assign(taps * tap_lanes, 0);
    const int32_t offset = storage == Storage::I8 ? -kernels_.offset : 0;
    for (int32_t tap = 0; tap < taps; ++tap) {
      const uint8_t* from = data<uint8_t>(rows) + (size_t)tap * num_rows * width * item;
      uint8_t* to = values_.get() + tap * tap_bytes;
      for (int32_t row = 0; row < num_rows; ++row, from += width * item) {
        uint8_t* panel = to + (size_t)(row / lanes) * depth * lanes * group * item;
        for (int32_t k = 0; k < width; ++k)
          std::memcpy(panel + (((size_t)(k / group) * lanes + row % lanes) * group + k % group) * item,
                      from + k * item, item);
        const size_t lane = tap * tap_lanes + row;
        scales_[lane] = data<float>(scales)[(size_t)tap * num_rows + row];
        bias_[lane] = 0;
        if (offset)
          for (int32_t k = 0; k < width; ++k) start_[lane] += offset * (int32_t)(int8_t)from[k];
      }
      views_.push_back({storage, num_rows, width, count, depth, to, scales_.data() + tap * tap_lanes,
                        bias_.data() + tap * tap_lanes, start_.data() + tap * tap_lanes});
    }
  }

  const Kernels& kernels() const { return kernels_; }
  const Panels& tap(int32_t index) const { return views_[index]; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  const Kernels& kernels_;
  std::unique_ptr<uint8_t, Free> values_;
  std::vector<float> scales_, bias_;
  std::vector<int32_t> start_;
  std::vector<Panels> views_;
};

constexpr int32_t kMostQueries = 128;  // of one task: with a panel they stay in the second-level cache

void match(const PackedBank& bank, const py::array& features, py::array& distance, const py::object& nearest,
           int32_t threads, const py::object& gains, const py::object& scaled) {
  const int32_t batch = size32(features.shape(0)), taps = size32(features.shape(1));
  const int32_t patches = size32(features.shape(2)), width = size32(features.shape(3));
  const float* queries = data<float>(features);
  float* out = mutable_data<float>(distance);
  py::array index_array;
  int32_t* indices = nullptr;
  if (!nearest.is_none()) {
    index_array = nearest.cast<py::array>();
    indices = mutable_data<int32_t>(index_array);
  }
  py::array gain_array, scaled_array;
  const float* gain = nullptr;  // of each tap and row
  float* scaled_out = nullptr;
  if (!gains.is_none()) {
    gain_array = gains.cast<py::array>(), scaled_array = scaled.cast<py::array>();
    gain = data<float>(gain_array), scaled_out = mutable_data<float>(scaled_array);
  }
  py::gil_scoped_release release;
  threads = std::max(threads, 1);
  const Kernels& kernels = bank.kernels();
  const int64_t all = (int64_t)batch * taps * patches;
  // One thread gains from sharing each panel among all queries, several from equal shares.
  const int32_t share = threads == 1 ? patches : (patches + threads - 1) / threads;
  const int32_t most = std::min(std::max((share + 15) / 16 * 16, 16), kMostQueries);
  const int32_t parts = tasks_of(patches, most);
  const size_t each = padded(kernels.match_scratch(bank.tap(0), std::min(most, patches)));
  uint8_t* memory = scratch().get(padded((size_t)all * 4) + (indices ? 0 : padded((size_t)all * 4)) + each * threads);
  float* similarity = (float*)memory;
  memory += padded((size_t)all * 4);
  if (!indices) {
    indices = (int32_t*)memory;
    memory += padded((size_t)all * 4);
  }
  parallel(batch * taps * parts, threads, [&](int32_t task, int32_t slot) {
    const int32_t plane = task / parts, first = task % parts * most;  // plane: image × tap
    const int64_t query = (int64_t)plane * patches + first;
    const MatchTask work = {bank.tap(plane % taps), queries + query * width, std::min(most, patches - first),
                            similarity + query, indices + query};
    kernels.match(work, memory + slot * each);
  });
  for (int32_t image = 0; image < batch; ++image)
    for (int32_t patch = 0; patch < patches; ++patch) {
      float sum = 0;
      for (int32_t tap = 0; tap < taps; ++tap) sum += similarity[((int64_t)image * taps + tap) * patches + patch];
      out[(int64_t)image * patches + patch] = 1 - sum / (float)taps;
    }
  if (!gain) return;
  for (int32_t image = 0; image < batch; ++image)
    for (int32_t patch = 0; patch < patches; ++patch) {
      float sum = 0;
      for (int32_t tap = 0; tap < taps; ++tap) {
        const int64_t at = ((int64_t)image * taps + tap) * patches + patch;
        if (indices[at] < 0)
          sum = NAN;
        else
          sum += gain[(int64_t)tap * bank.tap(tap).rows + indices[at]] * std::max(1 - similarity[at], 0.0f);
      }
      scaled_out[(int64_t)image * patches + patch] = sum;
    }
}

void match_places(const std::string& name, const py::array& features, const py::array& reference, int32_t radius,
                  py::array& out, int32_t threads) {
  const Kernels& kernels = level(name);
  const int32_t batch = size32(features.shape(0)), taps = size32(features.shape(1));
  const int32_t patches = size32(features.shape(2)), width = size32(features.shape(3));
  const int32_t count = size32(reference.shape(0)), side = (int32_t)std::lround(std::sqrt((double)patches));
  const float *queries = data<float>(features), *normals = data<float>(reference);
  float* to = mutable_data<float>(out);
  py::gil_scoped_release release;
  threads = std::max(threads, 1);
  radius = std::min(radius, side - 1);
  const int32_t planes = batch * taps, stride = kernels.places_stride(side, radius);
  const size_t row_floats = (size_t)width * stride;
  float* packed = (float*)scratch().get(padded((size_t)planes * side * row_floats * 4) + (size_t)planes * patches);
  uint8_t* finite = (uint8_t*)packed + padded((size_t)planes * side * row_floats * 4);
  parallel(planes * side, threads, [&](int32_t row, int32_t) {
    kernels.pack_places(queries + (size_t)row * side * width, side, width, radius, packed + row * row_floats,
                        finite + (size_t)row * side);
  });
  parallel(planes * side, threads, [&](int32_t task, int32_t) {
    const int32_t plane = task / side, y = task % side, image = plane / taps, tap = plane % taps;
    const int32_t top = std::max(y - radius, 0), bottom = std::min(y + radius + 1, side);
    const float* from = normals + ((size_t)tap * patches + (size_t)y * side) * width;
    float* rows_out = to + ((size_t)image * count * taps + tap) * patches + (size_t)y * side;
    const ptrdiff_t step = (ptrdiff_t)taps * patches;
    kernels.match_places({packed + ((size_t)plane * side + top) * row_floats, bottom - top, side, width, radius, stride,
                          from, step * width, count, rows_out, step});
    for (int32_t row = top; row < bottom; ++row)
      for (int32_t x = 0; x < side; ++x) {
        if (finite[((size_t)plane * side + row) * side + x]) continue;
        for (int32_t index = 0; index < count; ++index)
          std::fill(rows_out + index * step + std::max(x - radius, 0),
                    rows_out + index * step + std::min(x + radius + 1, side), NAN);
      }
  });
}

constexpr int32_t kRowsPerDots = 256;

void coreset(const std::string& name, const py::array& features, py::array& chosen, int32_t threads) {
  const Kernels& kernels = level(name);
  const int32_t taps = size32(features.shape(0)), rows = size32(features.shape(1)), width = size32(features.shape(2));
  const int32_t size = size32(chosen.shape(1));
  const float* all = data<float>(features);
  int32_t* out = mutable_data<int32_t>(chosen);
  py::gil_scoped_release release;
  float* nearest = (float*)scratch().get(padded((size_t)rows * 4) * 2 + (size_t)width * 4);
  float* similarity = nearest + padded((size_t)rows * 4) / 4;
  float* centre = similarity + padded((size_t)rows * 4) / 4;
  for (int32_t tap = 0; tap < taps; ++tap) {
    const float* from = all + (size_t)tap * rows * width;
    const auto dots = [&](const float* vector) {
      parallel(tasks_of(rows, kRowsPerDots), threads, [&](int32_t task, int32_t) {
        const int32_t first = task * kRowsPerDots;
        kernels.dots(from + (size_t)first * width, std::min(kRowsPerDots, rows - first), width, vector,
                     similarity + first);
      });
    };
    for (int32_t k = 0; k < width; ++k) {
      double sum = 0;
      for (int32_t row = 0; row < rows; ++row) sum += from[(size_t)row * width + k];
      centre[k] = (float)(sum / rows);
    }
    dots(centre);
    int32_t pick = (int32_t)(std::max_element(similarity, similarity + rows) - similarity);
    std::fill(nearest, nearest + rows, -INFINITY);
    for (int32_t step = 0; step < size; ++step) {
      out[(size_t)tap * size + step] = pick;
      dots(from + (size_t)pick * width);
      for (int32_t row = 0; row < rows; ++row) nearest[row] = std::max(nearest[row], similarity[row]);
      nearest[pick] = INFINITY;  // never twice
      pick = (int32_t)(std::min_element(nearest, nearest + rows) - nearest);
    }
  }
}

// -- maps ----------------------------------------------------------------------------------------------------------------------

constexpr int32_t kMapRowsPerTask = 56;
constexpr int64_t kSharedPixels = 1 << 19;  // interpolated values below which waking a thread takes longer than it saves

size_t map_floats(int32_t size) { return padded((size_t)size * 4 + 64) / 4; }

void upsample(const std::string& name, const py::array& grids, int32_t side, py::array& out, int32_t threads) {
  const Kernels& kernels = level(name);
  const int32_t batch = size32(out.shape(0)), size = size32(out.shape(1));
  const float* from = data<float>(grids);
  float* to = mutable_data<float>(out);
  py::gil_scoped_release release;
  threads = (int64_t)batch * size * size < 4 * kSharedPixels ? 1 : std::max(threads, 1);
  const size_t each = (size_t)(side + 1) * map_floats(size);
  float* memory = (float*)scratch().get(each * 4 * threads);
  const int32_t per_task = threads == 1 || batch >= threads ? size : kMapRowsPerTask, parts = tasks_of(size, per_task);
  parallel(batch * parts, threads, [&](int32_t task, int32_t slot) {
    const int32_t image = task / parts, first = task % parts * per_task;
    kernels.upsample(from + (size_t)image * side * side, side, to + (size_t)image * size * size, size, first,
                     std::min(first + per_task, size), memory + slot * each);
  });
}

void localise(const std::string& name, const py::array& logits, int32_t side, py::array& out, int32_t threads) {
  const Kernels& kernels = level(name);
  const int32_t batch = size32(out.shape(0)), size = size32(out.shape(1)), taps = size32(logits.shape(1));
  const float* from = data<float>(logits);
  float* to = mutable_data<float>(out);
  py::gil_scoped_release release;
  threads = (int64_t)batch * taps * size * size < kSharedPixels ? 1 : std::max(threads, 1);
  const size_t planes = (size_t)taps * side * side, each = ((size_t)taps * side + 1) * map_floats(size);
  float* differences = (float*)scratch().get(padded(planes * batch * 4) + each * 4 * threads);
  float* memory = differences + padded(planes * batch * 4) / 4;
  for (size_t i = 0; i < planes * batch; ++i) differences[i] = from[2 * i + 1] - from[2 * i];
  const int32_t per_task = threads == 1 || batch >= threads ? size : kMapRowsPerTask, parts = tasks_of(size, per_task);
  parallel(batch * parts, threads, [&](int32_t task, int32_t slot) {
    const int32_t image = task / parts, first = task % parts * per_task;
    kernels.localise(differences + image * planes, taps, side, to + (size_t)image * size * size, size, first,
                     std::min(first + per_task, size), memory + slot * each);
  });
}

void project(const py::array& maps, const py::array& places, py::array& out, int32_t threads) {
  const int32_t count = size32(maps.shape(0)), side = size32(maps.shape(1));
  const int32_t height = size32(out.shape(0)), width = size32(out.shape(1));
  const float* from = data<float>(maps);
  const double* at = data<double>(places);
  float* to = mutable_data<float>(out);
  py::gil_scoped_release release;
  threads = std::max(threads, 1);
  thread_local ColumnTables tables;  // keeps its memory from call to call
  tables.fill(at, count, side, width);
  const ColumnTables* const columns = &tables;  // `tables` is another variable in each thread
  const size_t each = padded(((size_t)width * 2 + side + 1) * 4) / 4;
  float* memory = (float*)scratch().get(each * 4 * threads);
  parallel(tasks_of(height, kRowsPerTask), threads, [&, columns](int32_t task, int32_t slot) {
    project_rows(from, at, *columns, count, side, to, width, task * kRowsPerTask,
                 std::min((task + 1) * kRowsPerTask, height), memory + slot * each);
  });
}

py::tuple summarise_map(const py::array& map, int64_t top) {
  Figures figures{};
  {
    const float* values = data<float>(map);
    const int64_t count = map.size();
    py::gil_scoped_release release;
    figures = summarise(values, count, top);
  }
  return py::make_tuple(figures.peak, figures.lowest, figures.median, figures.top_mean);
}

void cell_peaks(const std::string& name, const py::array& map, py::array& out) {
  const Kernels& kernels = level(name);
  const int32_t height = size32(map.shape(0)), width = size32(map.shape(1)), cells = size32(out.shape(0));
  const float* values = data<float>(map);
  float* to = mutable_data<float>(out);
  py::gil_scoped_release release;
  kernels.cell_peaks(values, height, width, cells, to, (float*)scratch().get((size_t)width * 4));
}

py::tuple components(const py::array& map, float level_) {
  thread_local std::vector<Region> found;
  {
    const float* values = data<float>(map);
    const int32_t height = size32(map.shape(0)), width = size32(map.shape(1));
    py::gil_scoped_release release;
    find_components(values, height, width, level_, found);
  }
  py::array_t<int32_t> rows({(py::ssize_t)found.size(), (py::ssize_t)5});
  py::array_t<float> peaks((py::ssize_t)found.size());
  int32_t* row = rows.mutable_data();
  float* peak = peaks.mutable_data();
  for (const Region& region : found) {
    for (int32_t value : {region.x, region.y, region.width, region.height, region.area}) *row++ = value;
    *peak++ = region.peak;
  }
  return py::make_tuple(rows, peaks);
}

// -- prompt ----------------------------------------------------------------------------------------------------------------------

constexpr int32_t kRowsPerPack = 16;

void pack_prompt(const std::string& name, const py::array& table, int32_t type, const py::array& ids,
                 const py::array& injected, py::array& out, int32_t threads) {
  const Kernels& kernels = level(name);
  const int32_t length = size32(out.shape(0));
  const int64_t width = out.shape(1), row_bytes = table.shape(1);
  const uint8_t* rows = data<uint8_t>(table);
  const int32_t* id = data<int32_t>(ids);
  const float* own = data<float>(injected);
  float* to = mutable_data<float>(out);
  py::gil_scoped_release release;
  parallel(tasks_of(length, kRowsPerPack), std::max(threads, 1), [&](int32_t task, int32_t) {
    const int32_t first = task * kRowsPerPack;
    int64_t next = std::count_if(id, id + first, [](int32_t value) { return value < 0; });
    for (int32_t i = first; i < std::min(first + kRowsPerPack, length); ++i) {
      if (id[i] < 0)
        std::memcpy(to + i * width, own + next++ * width, (size_t)width * 4);
      else
        kernels.dequantise(static_cast<Rows>(type), rows + id[i] * row_bytes, width, to + i * width);
    }
  });
}

}  // namespace
}  // namespace agpt

PYBIND11_MODULE(_native, module) {
  using namespace agpt;
  module.doc() = "Compiled kernels; anomalygpt_edge.kernels checks arguments and calls them.";
  module.def("levels", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : levels()) names.push_back(kernels->name);
    return names;
  });
  py::class_<PackedFilter>(module, "Filter")
      .def(py::init<const std::string&, const py::array&, const py::array&, const py::array&>());
  py::class_<PackedBank>(module, "Bank").def(py::init<const std::string&, const py::array&, const py::array&>());
  module.def("preprocess", &preprocess);
  module.def("match", &match);
  module.def("match_places", &match_places);
  module.def("coreset", &coreset);
  module.def("upsample", &upsample);
  module.def("localise", &localise);
  module.def("project", &project);
  module.def("summarise", &summarise_map);
  module.def("cell_peaks", &cell_peaks);
  module.def("components", &components);
  module.def("pack_prompt", &pack_prompt);
}
