// Compiles GRASSLAND_SOURCE, a header of functions over rows, once for each vector unit, in the namespace that includes this.
// Such a header includes nothing but others of its kind; those of its functions that are called from outside, by way of
// GRASSLAND_BEST (vec.h), are GRASSLAND_UNIT.

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
namespace avx512 {
#define GRASSLAND_REGISTER 16
#define GRASSLAND_UNIT \
  __attribute__((target("avx2,bmi,bmi2,f16c,fma,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#include "unit.h"
#include GRASSLAND_SOURCE
#undef GRASSLAND_REGISTER
#undef GRASSLAND_UNIT
}  // namespace avx512

namespace avx2 {
#define GRASSLAND_REGISTER 8
#define GRASSLAND_UNIT __attribute__((target("avx2,bmi,bmi2,f16c,fma,lzcnt,movbe")))
#include "unit.h"
#include GRASSLAND_SOURCE
#undef GRASSLAND_REGISTER
#undef GRASSLAND_UNIT
}  // namespace avx2
#endif

namespace plain {
#define GRASSLAND_REGISTER 4
#define GRASSLAND_UNIT
#include "unit.h"
#include GRASSLAND_SOURCE
#undef GRASSLAND_REGISTER
#undef GRASSLAND_UNIT
}  // namespace plain
