// One instruction-set level: compiled with -DLEVEL=baseline, avx2, avx512, vnni or neondot and the flags that go
// with it (setup.py).
#include "kernels.h"

using namespace agpt;

#include "simd.h"
#include "resample.h"
#include "nearest.h"
#include "places.h"
#include "maps.h"
#include "blocks.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

const Kernels* agpt::JOIN(LEVEL, _kernels)() {
  static const Kernels table = {
      "cpu-" TEXT(LEVEL), kWeightBytes,  pack_weights, columns_scratch, columns,  rows,       convert, kPanel, kGroup,
      kOffset,            match_scratch, match,        dots,            places_stride, pack_places, match_places,
      upsample,           localise,      cell_peaks,   dequantise,
  };
  return &table;
}
