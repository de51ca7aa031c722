#include "frames.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace agpt {

// -- regions: runs of a row, joined with the runs they touch in the row above ----------------------------------------------

namespace {

struct Run {
  int32_t begin, end, label;
};

int32_t root_of(std::vector<int32_t>& parent, int32_t label) {
  while (parent[label] != label) label = parent[label] = parent[parent[label]];
  return label;
}

}  // namespace

void find_components(const float* map, int32_t height, int32_t width, float level, std::vector<Region>& found) {
  thread_local std::vector<int32_t> parent;
  thread_local std::vector<Run> above, current;
  parent.clear(), above.clear(), found.clear();
  for (int32_t y = 0; y < height; ++y) {
    const float* row = map + (int64_t)y * width;
    current.clear();
    size_t touching = 0;
    for (int32_t x = 0; x < width;) {
      if (!(row[x] >= level)) {
        ++x;
        continue;
      }
      const int32_t begin = x;
      float peak = row[x];
      for (; x < width && row[x] >= level; ++x) peak = std::max(peak, row[x]);
      int32_t label = (int32_t)found.size();
      parent.push_back(label);
      found.push_back({begin, y, x, y + 1, x - begin, peak});  // width and height hold the far sides until the end
      while (touching < above.size() && above[touching].end < begin) ++touching;
      for (size_t i = touching; i < above.size() && above[i].begin <= x; ++i) {
        const int32_t a = root_of(parent, above[i].label), b = root_of(parent, label);
        if (a == b) continue;
        const int32_t kept = std::min(a, b), merged = std::max(a, b);
        parent[merged] = kept;
        Region &into = found[kept], &from = found[merged];
        into.x = std::min(into.x, from.x), into.y = std::min(into.y, from.y);
        into.width = std::max(into.width, from.width), into.height = std::max(into.height, from.height);
        into.area += from.area, into.peak = std::max(into.peak, from.peak);
      }
      current.push_back({begin, x, label});
    }
    above.swap(current);
  }
  size_t kept = 0;
  for (size_t label = 0; label < found.size(); ++label) {
    if (parent[label] != (int32_t)label) continue;
    Region region = found[label];
    region.width -= region.x, region.height -= region.y;
    found[kept++] = region;
  }
  found.resize(kept);
}

// -- figures: selection by the upper, then the lower half of each value's bits ------------------------------------------------

namespace {

constexpr int64_t kBuckets = 1 << 16;

inline uint32_t key_of(float value) {  // orders as the values do
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The values at rank `low` and the next (ascending, from 0), and how many lie above the latter's upper half.
uint32_t select_key(const float* map, int64_t count, int64_t rank, const std::vector<int32_t>& upper,
                    std::vector<int32_t>& lower) {
  int64_t before = 0, bucket = 0;
  while (before + upper[bucket] <= rank) before += upper[bucket++];
  std::fill(lower.begin(), lower.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = key_of(map[i]);
    if ((int64_t)(key >> 16) == bucket) ++lower[key & 0xffff];
  }
  int64_t low = 0;
  while (before + lower[low] <= rank) before += lower[low++];
  return (uint32_t)(bucket << 16 | low);
}

}  // namespace

Figures summarise(const float* map, int64_t count, int64_t top) {
  thread_local std::vector<int32_t> upper(kBuckets), lower(kBuckets);
  std::fill(upper.begin(), upper.end(), 0);
  float peak = map[0], lowest = map[0], check = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = map[i];
    check += value - value;  // 0, or NaN
    peak = value > peak ? value : peak;
    lowest = value < lowest ? value : lowest;
    ++upper[key_of(value) >> 16];
  }
  if (check != 0) return {NAN, NAN, NAN, NAN};
  const uint32_t limit = select_key(map, count, count - top, upper, lower);
  const float limit_value = value_of(limit);
  double sum = 0;
  int64_t higher = 0;
  for (int64_t i = 0; i < count; ++i)
    if (map[i] > limit_value) sum += map[i], ++higher;
  sum += (double)limit_value * (double)(top - higher);
  const float middle = value_of(select_key(map, count, count / 2, upper, lower));
  const float before = count % 2 ? middle : value_of(select_key(map, count, count / 2 - 1, upper, lower));
  return {peak, lowest, count % 2 ? middle : (before + middle) / 2, sum / (double)top};
}

// -- maps in frames -------------------------------------------------------------------------------------------------------------

namespace {

constexpr double kEdge = 1e-6;  // map pixels: a point on a map's edge belongs to it, whatever the rounding

inline float distance_to_edge(double u, int32_t side) {
  return (float)std::max(std::min(u, side - u), 1e-3);
}

inline void split(double u, int32_t side, int32_t* low, int32_t* next, float* share) {
  const double inside = std::min(std::max(u - 0.5, 0.0), (double)(side - 1));
  *low = std::min((int32_t)inside, side > 1 ? side - 2 : 0);
  *next = std::min(*low + 1, side - 1);
  *share = (float)(inside - *low);
}

// Frame columns whose point can lie on the map, given one condition -edge ≤ slope · x + offset ≤ side + edge.
inline void narrow_to(double slope, double offset, int32_t side, int32_t width, int32_t* first, int32_t* last) {
  if (std::fabs(slope) < 1e-12) {
    if (offset < -kEdge || offset > side + kEdge) *last = *first;
    return;
  }
  double a = (-kEdge - offset) / slope - 0.5, b = (side + kEdge - offset) / slope - 0.5;
  if (a > b) std::swap(a, b);
  // One pixel more on either side: each pixel is tested anyway.
  *first = std::max(*first, (int32_t)std::max(0.0, std::min(a, (double)width)) - 1);
  *last = std::min(*last, (int32_t)std::max(0.0, std::min(b, (double)width)) + 2);
  *first = std::max(*first, 0), *last = std::min(*last, width);
}

inline bool covers(double u, int32_t side) { return u >= -kEdge && u <= side + kEdge; }

// A row of an upright map: two of its rows mixed, then every column between two of its values.
void add_upright(const float* map, double v, int32_t side, const ColumnTables::Span& span,
                 const ColumnTables::Column* columns, float* mixed, float* totals, float* weights) {
  if (span.first >= span.last || !covers(v, side)) return;
  int32_t top, bottom;
  float down;
  split(v, side, &top, &bottom, &down);
  const float *above = map + (int64_t)top * side, *below = map + (int64_t)bottom * side;
  const int32_t count = span.last - span.first, right = std::min(columns[count - 1].left + 1, side - 1);
  for (int32_t i = columns[0].left; i <= right; ++i) mixed[i] = above[i] * (1 - down) + below[i] * down;
  mixed[right + 1] = mixed[right];  // a map of one column has no next one
  const float weight_down = distance_to_edge(v, side);
  totals += span.first, weights += span.first;
  for (int32_t i = 0; i < count; ++i) {
    const ColumnTables::Column& column = columns[i];
    const float* pair = mixed + column.left;
    const float weight = column.weight * weight_down;
    totals[i] += weight * (pair[0] * (1 - column.across) + pair[1] * column.across);
    weights[i] += weight;
  }
}

}  // namespace

void ColumnTables::fill(const double* places, int32_t count, int32_t side, int32_t width) {
  spans.clear(), columns.clear();
  for (int32_t m = 0; m < count; ++m) {
    const double* p = places + 6 * (int64_t)m;
    Span span = {0, width, -1};
    if (p[1] == 0 && p[3] == 0) {
      const auto u = [&](int32_t column) { return p[0] * (column + 0.5) + p[2]; };
      narrow_to(p[0], p[2], side, width, &span.first, &span.last);
      while (span.first < span.last && !covers(u(span.first), side)) ++span.first;
      while (span.first < span.last && !covers(u(span.last - 1), side)) --span.last;
      span.start = (int64_t)columns.size();
      for (int32_t column = span.first; column < span.last; ++column) {
        Column found;
        int32_t next;
        split(u(column), side, &found.left, &next, &found.across);
        found.weight = distance_to_edge(u(column), side);
        columns.push_back(found);
      }
    }
    spans.push_back(span);
  }
}

void project_rows(const float* maps, const double* places, const ColumnTables& tables, int32_t count, int32_t side,
                  float* out, int32_t width, int32_t first_row, int32_t last_row, float* scratch) {
  float *totals = scratch, *weights = scratch + width, *mixed = scratch + 2 * (int64_t)width;
  for (int32_t row = first_row; row < last_row; ++row) {
    std::fill(totals, totals + 2 * (int64_t)width, 0.0f);
    const double y = row + 0.5;
    for (int32_t m = 0; m < count; ++m) {
      const double* p = places + 6 * (int64_t)m;
      const float* map = maps + (int64_t)m * side * side;
      const double u0 = p[1] * y + p[2], v0 = p[4] * y + p[5];
      const ColumnTables::Span& span = tables.spans[m];
      if (span.start >= 0) {
        add_upright(map, v0, side, span, tables.columns.data() + span.start, mixed, totals, weights);
        continue;
      }
      int32_t first = 0, last = width;
      narrow_to(p[0], u0, side, width, &first, &last);
      narrow_to(p[3], v0, side, width, &first, &last);
      for (int32_t column = first; column < last; ++column) {
        const double x = column + 0.5;
        const double u = p[0] * x + u0, v = p[3] * x + v0;
        if (!covers(u, side) || !covers(v, side)) continue;
        int32_t left, right, top, bottom;
        float across, down;
        split(u, side, &left, &right, &across);
        split(v, side, &top, &bottom, &down);
        const float *above = map + (int64_t)top * side, *below = map + (int64_t)bottom * side;
        const float upper = above[left] * (1 - across) + above[right] * across;
        const float lower = below[left] * (1 - across) + below[right] * across;
        const float weight = distance_to_edge(u, side) * distance_to_edge(v, side);
        totals[column] += weight * (upper * (1 - down) + lower * down);
        weights[column] += weight;
      }
    }
    float* line = out + (int64_t)row * width;
    for (int32_t column = 0; column < width; ++column)
      if (weights[column] > 0) line[column] = totals[column] / weights[column];
  }
}

}  // namespace agpt
