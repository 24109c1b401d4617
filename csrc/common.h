// Shared by the CPU kernels: stable-ABI tensors, matrix products by ATen, run-time choice of the vector unit.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

// One function of plain loops, compiled for AVX-512, AVX2 and the baseline; the loader picks what the CPU has. For functions
// on vectors there is units.h.
// Compilers before GCC 12 and clang 18 do not clone for the levels of x86-64; their AVX2 has no fused multiply-add.
#if defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 12
#define GRASSLAND_LEVELS "arch=x86-64-v4", "arch=x86-64-v3"
#else
#define GRASSLAND_LEVELS "avx512f", "avx2"
#endif
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define GRASSLAND_MULTIARCH __attribute__((target_clones(GRASSLAND_LEVELS, "default")))
#else
#define GRASSLAND_MULTIARCH
#endif
// A clone inherits vectorisation only from what is inlined into it.
#define GRASSLAND_INLINE __attribute__((always_inline)) static inline

// Before the body of a lambda: one that is not inlined would be compiled for the baseline.
#define GRASSLAND_INLINE_LAMBDA __attribute__((always_inline))

namespace grassland {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;

struct bf16 {
  uint16_t bits;
};

template <typename T>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<bf16> = ScalarType::BFloat16;

GRASSLAND_INLINE float to_float(float x) { return x; }

GRASSLAND_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

GRASSLAND_INLINE void from_float(float x, float& out) { out = x; }

// Round to nearest even; a NaN stays a NaN.
GRASSLAND_INLINE void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// e^r = 1 + r + r^2 p(r), p the polynomial of degree 4 with the least relative error for |r| <= ln 2 / 2: 3e-9.
constexpr float kExp[] = {0.49999993f, 0.1666652f, 0.04166839f, 0.008368745f, 0.001381454f};

// e^x to about one ulp for |x| <= 87, clamped beyond: x = n ln 2 + r.
GRASSLAND_INLINE float exp_approx(float x) {
  x = std::min(std::max(x, -87.0f), 87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = kExp[4] * r + kExp[3];
  p = p * r + kExp[2];
  p = p * r + kExp[1];
  p = p * r + kExp[0];
  p = (p * r) * r + r + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

GRASSLAND_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

inline Tensor rows(const Tensor& x, int64_t begin, int64_t end) {
  Tensor base = x;
  return torch::stable::narrow(base, 0, begin, end - begin);
}

// out = a b
inline void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = beta * out + a b
inline void addmm(const Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace grassland
