// What needs no instruction set of its own: regions and figures of maps, and maps laid over a frame.
#pragma once

#include <cstdint>
#include <vector>

namespace agpt {

struct Region {
  int32_t x, y, width, height, area;
  float peak;
};

struct Figures {
  float peak, lowest, median;
  double top_mean;
};

// Connected pixels (8 neighbours) at or above `level`, in the order of their first pixel.
void find_components(const float* map, int32_t height, int32_t width, float level, std::vector<Region>& found);

// All NaN when a value is not finite.
Figures summarise(const float* map, int64_t count, int64_t top);

// Where the columns of a frame lie on each upright map: worked out once, not again for every row.
struct ColumnTables {
  struct Column {
    int32_t left;          // the map's column to the left of it
    float across, weight;  // its share in the next one; distance to the nearer side edge
  };
  struct Span {
    int32_t first, last;  // columns of the frame
    int64_t start;        // in `columns`; -1: the map is rotated
  };

  void fill(const double* places, int32_t count, int32_t side, int32_t width);

  std::vector<Span> spans;  // one a map
  std::vector<Column> columns;
};

// Rows [first, last) of a frame: maps [count][side][side] at their places [count][6] (geometry.frame_to_map),
// blended where they overlap; `scratch` holds 2 × width + side + 1 floats. What no map covers is left as it is.
void project_rows(const float* maps, const double* places, const ColumnTables& tables, int32_t count, int32_t side,
                  float* out, int32_t width, int32_t first, int32_t last, float* scratch);

}  // namespace agpt
