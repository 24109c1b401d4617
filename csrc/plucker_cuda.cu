// Causal Grassmann Plücker mixing in CUDA C++: the algorithm of plucker.cpp with one warp a token and cuBLAS products.
//
// The wedges of a chunk stay in L2 between the kernel that writes them and the product that reads them (arXiv 2512.19428;
// algebra in kernels/plucker/eager.py). Sums over a warp are butterflies and every gradient is gathered: no atomics.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "check.h"

namespace grassland::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kWarps = 8, kWarp = 32;
// A lane holds PL = 1, 2 or 4 numbers of z.
constexpr int kMaxRank = kWarp * 4, kMaxOffsets = 64;
constexpr int64_t kChunk = 16384;

struct Problem {
  const float* z;
  int64_t tokens, length;
  int rank, pairs, dim, many;
  float eps;
  int64_t offsets[kMaxOffsets];
};

// What a pair gives to its source: dz_s += scale dy_t + slope (z_s - ratio z_t).
struct Link {
  float ratio, scale, slope;
};

__device__ float warp_sum(float x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

template <int PL>
__device__ float dot(const float* a, const float* b) {
  float sum = 0;
  for (int k = 0; k < PL; ++k) sum += a[k] * b[k];
  return warp_sum(sum);
}

template <int PL>
__device__ void load(const float* row, int rank, int lane, float* out) {
  for (int k = 0; k < PL; ++k) out[k] = lane + kWarp * k < rank ? row[lane + kWarp * k] : 0.0f;
}

template <int PL>
__device__ void store(const float* values, int rank, int lane, float* row) {
  for (int k = 0; k < PL; ++k)
    if (lane + kWarp * k < rank) row[lane + kWarp * k] = values[k];
}

struct Pair {
  float square, ratio, rest, norm, scale;
};

// delta = z_s - c z_t, N = |z_t| |delta|, scale = 1 / (n max(N, eps))
template <int PL>
__device__ Pair pair_of(const Problem& p, const float* zt, const float* zs, int count, float* delta) {
  Pair out;
  out.square = dot<PL>(zt, zt);
  const float inner = dot<PL>(zt, zs);
  out.ratio = out.square > 0 ? inner / out.square : 0.0f;
  for (int k = 0; k < PL; ++k) delta[k] = zs[k] - out.ratio * zt[k];
  out.rest = dot<PL>(delta, delta);
  out.norm = sqrtf(out.square) * sqrtf(out.rest);
  out.scale = 1.0f / (fmaxf(out.norm, p.eps) * static_cast<float>(count));
  return out;
}

__device__ int valid(const Problem& p, int64_t t) {
  int count = 0;
  for (int k = 0; k < p.many; ++k) count += p.offsets[k] <= t;
  return count;
}

template <int PL>
__device__ void average(const Problem& p, int64_t token, int lane, const float* zt, float* y) {
  const int64_t t = token % p.length;
  const int count = valid(p, t);
  float zs[PL], delta[PL];
  for (int k = 0; k < PL; ++k) y[k] = 0;
  for (int o = 0; o < p.many; ++o) {
    if (p.offsets[o] > t) continue;
    load<PL>(p.z + (token - p.offsets[o]) * p.rank, p.rank, lane, zs);
    const Pair pair = pair_of<PL>(p, zt, zs, count, delta);
    for (int k = 0; k < PL; ++k) y[k] += pair.scale * delta[k];
  }
}

__device__ void put(float value, float* out) { *out = value; }
__device__ void put(float value, __nv_bfloat16* out) { *out = __float2bfloat16(value); }
__device__ float get(float value) { return value; }
__device__ float get(__nv_bfloat16 value) { return __bfloat162float(value); }

// Pairs (i, j), i < j, in lexicographic order; a lane writes its own columns j.
template <typename T, int PL>
__global__ void wedge_kernel(Problem p, int64_t base, int64_t stop, T* out) {
  __shared__ float zs[kWarps][kWarp * PL], ys[kWarps][kWarp * PL];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t token = base + static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= stop) return;
  float z[PL], y[PL];
  load<PL>(p.z + token * p.rank, p.rank, lane, z);
  average<PL>(p, token, lane, z, y);
  store<PL>(z, p.rank, lane, zs[warp]);
  store<PL>(y, p.rank, lane, ys[warp]);
  __syncwarp();
  T* row = out + (token - base) * p.pairs;
  for (int i = 0; i + 1 < p.rank; ++i) {
    const float zi = zs[warp][i], yi = ys[warp][i];
    for (int k = 0; k < PL; ++k) {
      const int j = lane + kWarp * k;
      if (j > i && j < p.rank) put(zi * y[k] - z[k] * yi, row + (j - i - 1));
    }
    row += p.rank - 1 - i;
  }
}

// dz = D y, dy = -D z, then the token's pairs as targets (formulas in plucker.cpp).
template <typename T, int PL>
__global__ void wedge_backward_kernel(Problem p, int64_t base, int64_t stop, const T* grad, float* dz_out,
                                      float* dy_out, Link* links) {
  __shared__ float zs[kWarps][kWarp * PL], ys[kWarps][kWarp * PL];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t token = base + static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= stop) return;
  float z[PL], y[PL], dz[PL] = {}, dy[PL] = {};
  load<PL>(p.z + token * p.rank, p.rank, lane, z);
  average<PL>(p, token, lane, z, y);
  store<PL>(z, p.rank, lane, zs[warp]);
  store<PL>(y, p.rank, lane, ys[warp]);
  __syncwarp();
  const T* row = grad + (token - base) * p.pairs;
  for (int i = 0; i + 1 < p.rank; ++i) {
    const float zi = zs[warp][i], yi = ys[warp][i];
    float along_y = 0, along_z = 0;
    for (int k = 0; k < PL; ++k) {
      const int j = lane + kWarp * k;
      const float g = j > i && j < p.rank ? get(row[j - i - 1]) : 0.0f;
      along_y += g * y[k];
      along_z += g * z[k];
      dz[k] -= g * yi;
      dy[k] += g * zi;
    }
    along_y = warp_sum(along_y);
    along_z = warp_sum(along_z);
    for (int k = 0; k < PL; ++k) {
      if (lane + kWarp * k != i) continue;
      dz[k] += along_y;
      dy[k] -= along_z;
    }
    row += p.rank - 1 - i;
  }
  const int64_t t = token % p.length;
  const int count = valid(p, t);
  float source[PL], delta[PL];
  for (int o = 0; o < p.many; ++o) {
    Link link = {0, 0, 0};
    if (p.offsets[o] <= t) {
      load<PL>(p.z + (token - p.offsets[o]) * p.rank, p.rank, lane, source);
      const Pair pair = pair_of<PL>(p, z, source, count, delta);
      const float along = dot<PL>(dy, delta);
      const float kappa = pair.norm > p.eps ? -pair.scale * along / (pair.norm * pair.norm) : 0.0f;
      const float inner = pair.ratio * pair.square, shrink = pair.scale * pair.ratio;
      for (int k = 0; k < PL; ++k) dz[k] += kappa * (pair.rest * z[k] - inner * delta[k]) - shrink * dy[k];
      link = {pair.ratio, pair.scale, kappa * pair.square};
    }
    if (lane == 0) links[token * p.many + o] = link;
  }
  store<PL>(dz, p.rank, lane, dz_out + token * p.rank);
  store<PL>(dy, p.rank, lane, dy_out + token * p.rank);
}

template <int PL>
__global__ void sources_kernel(Problem p, const float* dy, const Link* links, float* dz) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= p.tokens) return;
  const int64_t t = token % p.length;
  float total[PL], z[PL], zt[PL], h[PL];
  load<PL>(dz + token * p.rank, p.rank, lane, total);
  load<PL>(p.z + token * p.rank, p.rank, lane, z);
  for (int o = 0; o < p.many; ++o) {
    if (t + p.offsets[o] >= p.length) continue;
    const int64_t later = token + p.offsets[o];
    load<PL>(p.z + later * p.rank, p.rank, lane, zt);
    load<PL>(dy + later * p.rank, p.rank, lane, h);
    const Link link = links[later * p.many + o];
    for (int k = 0; k < PL; ++k) total[k] += link.scale * h[k] + link.slope * (z[k] - link.ratio * zt[k]);
  }
  store<PL>(total, p.rank, lane, dz + token * p.rank);
}

template <typename T>
__global__ void add_kernel(float* total, const T* part, int64_t numel, bool first) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < numel) total[at] = (first ? 0.0f : total[at]) + get(part[at]);
}

template <typename T>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
constexpr ScalarType kDtype<__nv_bfloat16> = ScalarType::BFloat16;

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

cudaStream_t stream(const Tensor& x) {
  void* found = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &found));
  return static_cast<cudaStream_t>(found);
}

void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

void addmm(const Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor rows(const Tensor& x, int64_t begin, int64_t end) {
  Tensor base = x;
  return torch::stable::narrow(base, 0, begin, end - begin);
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

unsigned blocks(int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); }

Problem problem(const Tensor& z, const Tensor& weight, const std::vector<int64_t>& offsets, double eps) {
  STD_TORCH_CHECK(z.size(2) <= kMaxRank, "the cuda backend takes rank <= ", kMaxRank, ", got ", z.size(2));
  STD_TORCH_CHECK(offsets.size() <= kMaxOffsets, "the cuda backend takes at most ", kMaxOffsets, " offsets");
  Problem p{data<float>(z), z.size(0) * z.size(1), z.size(1), static_cast<int>(z.size(2)),
            static_cast<int>(weight.size(1)), static_cast<int>(weight.size(0)), static_cast<int>(offsets.size()),
            static_cast<float>(eps), {}};
  std::copy(offsets.begin(), offsets.end(), p.offsets);
  return p;
}

// Calls f with the integral constant PL for p's rank.
template <typename F>
void with_lanes(const Problem& p, F f) {
  if (p.rank <= kWarp) f(std::integral_constant<int, 1>());
  else if (p.rank <= 2 * kWarp) f(std::integral_constant<int, 2>());
  else f(std::integral_constant<int, 4>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void write_wedges(const Problem& p, int64_t base, int64_t stop, const Tensor& out) {
  with_lanes(p, [&](auto lanes) {
    wedge_kernel<T, decltype(lanes)::value>
        <<<blocks(stop - base, kWarps), kWarps * kWarp, 0, stream(out)>>>(p, base, stop, data<T>(out));
  });
}

template <typename T>
Tensor forward(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& offsets, double eps) {
  const Problem p = problem(z, weight, offsets, eps);
  Tensor out = empty(z, {p.tokens, p.dim}, kDtype<T>);
  const Tensor wedges = empty(z, {std::min(kChunk, p.tokens), p.pairs}, kDtype<T>);
  for (int64_t base = 0; base < p.tokens; base += kChunk) {
    const int64_t stop = std::min(base + kChunk, p.tokens);
    write_wedges<T>(p, base, stop, wedges);
    const Tensor o = rows(out, base, stop), tile = rows(wedges, 0, stop - base), w = torch::stable::transpose(weight, 0, 1);
    if (bias) addmm(o, *bias, tile, w);
    else mm(o, tile, w);
  }
  if (bias && p.tokens > 0) {
    // Tokens without a pair get no bias either.
    const int64_t first = std::min(p.length, *std::min_element(offsets.begin(), offsets.end()));
    const size_t token = p.dim * sizeof(T);
    cudaMemset2DAsync(data<T>(out), p.length * token, 0, first * token, z.size(0), stream(z));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return torch::stable::view(out, {z.size(0), z.size(1), p.dim});
}

template <typename T>
void add_weight_gradient(const Tensor& total, const Tensor& part, const Tensor& grad, const Tensor& wedges, bool first) {
  mm(part, torch::stable::transpose(grad, 0, 1), wedges);
  const int64_t numel = total.numel();
  add_kernel<T><<<blocks(numel, 256), 256, 0, stream(total)>>>(data<float>(total), data<T>(part), numel, first);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& z, const Tensor& weight,
                                    const std::vector<int64_t>& offsets, double eps, bool need_z, bool need_weight) {
  const Problem p = problem(z, weight, offsets, eps);
  const Tensor flat = torch::stable::view(grad, {p.tokens, p.dim});
  const int64_t chunk = std::min(kChunk, p.tokens);
  Tensor dz = empty(z, {z.size(0), z.size(1), p.rank}, ScalarType::Float);
  const Tensor dy = empty(z, {p.tokens, p.rank}, ScalarType::Float);
  const Tensor links = empty(z, {p.tokens, p.many, 3}, ScalarType::Float);
  const Tensor dweight = torch::stable::new_zeros(z, std::vector<int64_t>{p.dim, p.pairs}, ScalarType::Float);
  const Tensor part = empty(z, {p.dim, p.pairs}, kDtype<T>);
  const Tensor wedges = empty(z, {chunk, p.pairs}, kDtype<T>);
  Link* link = reinterpret_cast<Link*>(data<float>(links));
  for (int64_t base = 0; base < p.tokens; base += kChunk) {
    const int64_t stop = std::min(base + kChunk, p.tokens);
    const Tensor g = rows(flat, base, stop), tile = rows(wedges, 0, stop - base);
    if (need_weight) {
      write_wedges<T>(p, base, stop, wedges);
      add_weight_gradient<T>(dweight, part, g, tile, base == 0);
    }
    if (!need_z) continue;
    mm(tile, g, weight);
    with_lanes(p, [&](auto lanes) {
      wedge_backward_kernel<T, decltype(lanes)::value><<<blocks(stop - base, kWarps), kWarps * kWarp, 0, stream(z)>>>(
          p, base, stop, data<T>(wedges), data<float>(dz), data<float>(dy), link);
    });
  }
  if (need_z && p.tokens > 0) {
    with_lanes(p, [&](auto lanes) {
      sources_kernel<decltype(lanes)::value>
          <<<blocks(p.tokens, kWarps), kWarps * kWarp, 0, stream(z)>>>(p, data<float>(dy), link, data<float>(dz));
    });
  }
  return {dz, dweight};
}

bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Tensor plucker_mix(const Tensor& z, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> offsets,
                   double eps) {
  const DeviceGuard guard(z.get_device());
  return is_half(weight) ? forward<__nv_bfloat16>(z, weight, bias, offsets, eps)
                         : forward<float>(z, weight, bias, offsets, eps);
}

std::tuple<Tensor, Tensor> plucker_mix_backward(const Tensor& grad, const Tensor& z, const Tensor& weight,
                                                std::vector<int64_t> offsets, double eps, bool need_z,
                                                bool need_weight) {
  const DeviceGuard guard(z.get_device());
  return is_half(weight) ? backward<__nv_bfloat16>(grad, z, weight, offsets, eps, need_z, need_weight)
                         : backward<float>(grad, z, weight, offsets, eps, need_z, need_weight);
}

}  // namespace
}  // namespace grassland::cuda

// Inputs are contiguous and checked by kernels/plucker/op.py: z float32, the rest float32 or bfloat16 alike.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cuda, m) {
  m.def("plucker_mix(Tensor z, Tensor weight, Tensor? bias, int[] offsets, float eps) -> Tensor");
  m.def(
      "plucker_mix_backward(Tensor grad, Tensor z, Tensor weight, int[] offsets, float eps, bool need_z, "
      "bool need_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cuda, CUDA, m) {
  m.impl("plucker_mix", TORCH_BOX(&grassland::cuda::plucker_mix));
  m.impl("plucker_mix_backward", TORCH_BOX(&grassland::cuda::plucker_mix_backward));
}
