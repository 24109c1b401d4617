// Matrix products whose weight need not be copied or transposed first, and memory that is cheap to touch.
#pragma once

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// oneDNN's product, from the C interface for ahead-of-time compiled models. Its header takes no stable-ABI extension, and
// not every build of torch has it: a weak symbol is null where it is missing.
#if defined(__GNUC__) && !defined(__APPLE__)
#define GRASSLAND_HAS_ONEDNN
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* activation, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* out);
#endif

namespace grassland {

inline Tensor flipped(const Tensor& x) {
  Tensor base = x;
  return torch::stable::transpose(base, 0, 1);
}

// Up to so many rows, `skinny` is faster than either library: 1.2 to 2 times at 16.
constexpr int64_t kSkinny = 64;

// Whether `skinny` takes these.
bool skinny_fits(const Tensor& x, const Tensor& w);

// x w^T + bias for x (n, k), w (m, k), contiguous along k or m.
Tensor skinny(const Tensor& x, const Tensor& w, const Tensor* bias);

// float32 w (m, h) = or += g^T x for contiguous g (n, m), x (n, h), float32 or bfloat16; false, and nothing done, if that is
// not for this kernel.
bool skinny_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add);

// Whether oneDNN is to multiply. It reads a strided w at 1.1 to 1.5 times the speed of mm, but where mm is MKL on a
// processor of its maker, mm is never slower, and twice as fast in float32 for a wide w that is contiguous along m.
inline bool use_onednn(ScalarType dtype) {
#ifdef GRASSLAND_HAS_ONEDNN
#if defined(__x86_64__)
  // In bfloat16 it needs AVX-512.
  if (dtype == ScalarType::Float ? __builtin_cpu_is("intel") : !__builtin_cpu_supports("avx512bw")) return false;
#endif
  return aoti_torch_cpu__linear_pointwise != nullptr;
#else
  return false;
#endif
}

// x w^T + bias for x (n, k), w (m, k) of any strides.
inline Tensor linear(const Tensor& x, const Tensor& w, const Tensor* bias = nullptr) {
  if (skinny_fits(x, w)) return skinny(x, w, bias);
#ifdef GRASSLAND_HAS_ONEDNN
  // It has no sums of no terms.
  if (x.numel() > 0 && use_onednn(x.scalar_type())) {
    AtenTensorHandle out, added = bias == nullptr ? nullptr : bias->get();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
        x.get(), w.get(), bias == nullptr ? nullptr : &added, "none", nullptr, 0, nullptr, &out));
    return Tensor(out);
  }
#endif
  const Tensor out = empty(x, {x.size(0), w.size(0)}, x.scalar_type());
  if (bias == nullptr)
    mm(out, x, flipped(w));
  else
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), bias->get(), x.get(), flipped(w).get(), 1.0, 1.0));
  return out;
}

// Asks for large pages before a fresh tensor is written: a fault for each 4 KiB of a gradient of the experts' size takes
// longer than writing it.
inline void use_large_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + x.numel() * x.element_size()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace grassland
