// Causal Grassmann Plücker mixing in CUDA C++: the algorithm of plucker.cpp with cuBLAS products.
//
// The wedges of a chunk stay in L2 between the kernel that writes them and the product that reads them (arXiv 2512.19428;
// algebra in kernels/plucker/eager.py). Sums over lanes are butterflies and every gradient is gathered: no atomics.
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
#include <cfloat>
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

constexpr int kWarps = 8, kWarp = 32, kThreads = kWarps * kWarp;
// Bytes of shared memory that a block of any kernel gets without asking.
constexpr int kShared = 48 * 1024;
// The rank is at most PL warps, PL = 1, 2 or 4.
constexpr int kMaxRank = kWarp * 4, kMaxOffsets = 64;
constexpr int64_t kChunk = 16384;

struct Problem {
  const float* z;
  int64_t tokens, length;
  int rank, pairs, dim, many;
  float eps;
  bool aligned;
  int64_t reach, offsets[kMaxOffsets];
};

// A row of z, y or their gradients, kLanes lanes with four numbers each; a warp holds kWarp / kLanes rows.
template <int kLanes>
__device__ float dot(float4 a, float4 b) {
  float sum = fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  return sum;
}

// sum + s a
__device__ float4 add(float4 sum, float s, float4 a) {
  return {fmaf(s, a.x, sum.x), fmaf(s, a.y, sum.y), fmaf(s, a.z, sum.z), fmaf(s, a.w, sum.w)};
}

// Four numbers of a row from column c on, at x; zeros where there is none.
template <bool kAligned>
__device__ float4 load(const float* x, int c, int rank, bool there) {
  float4 out = {0, 0, 0, 0};
  if constexpr (kAligned) {
    if (there && c < rank) out = *reinterpret_cast<const float4*>(x);
  } else {
    if (there && c < rank) out.x = x[0];
    if (there && c + 1 < rank) out.y = x[1];
    if (there && c + 2 < rank) out.z = x[2];
    if (there && c + 3 < rank) out.w = x[3];
  }
  return out;
}

template <bool kAligned>
__device__ void store(float4 value, int c, int rank, bool there, float* x) {
  if constexpr (kAligned) {
    if (there && c < rank) *reinterpret_cast<float4*>(x) = value;
  } else {
    if (there && c < rank) x[0] = value.x;
    if (there && c + 1 < rank) x[1] = value.y;
    if (there && c + 2 < rank) x[2] = value.z;
    if (there && c + 3 < rank) x[3] = value.w;
  }
}

// z_t, its norm, and 1 / n_t.
struct Target {
  float4 z;
  float square, inverse, length, share;
};

struct Pair {
  float4 delta;
  float ratio, inner, rest, norm, inverse, scale;
};

__device__ float root(float x) { return x > 0 ? x * rsqrtf(x) : 0.0f; }

__device__ int64_t position(const Problem& p, int64_t token) {
  if (p.tokens > UINT32_MAX) return token % p.length;
  return static_cast<uint32_t>(token) % static_cast<uint32_t>(p.length);
}

// n_t, 1 where it is 0.
__device__ int valid(const Problem& p, int64_t t) {
  if (t >= p.reach) return p.many;
  int count = 0;
  for (int k = 0; k < p.many; ++k) count += p.offsets[k] <= t;
  return max(count, 1);
}

template <int kLanes>
__device__ Target target_of(const Problem& p, float4 z, int64_t t) {
  const float square = dot<kLanes>(z, z);
  // Where this is 0, c = 0: the wedge is the same for any c.
  const float inverse = square > FLT_MIN ? __fdividef(1.0f, square) : 0.0f;
  return {z, square, inverse, root(square), __fdividef(1.0f, static_cast<float>(valid(p, t)))};
}

// delta = z_s - c z_t, N = |z_t| |delta|, scale = 1 / (n max(N, eps)). A z_s or z_t of zeros gives and gets nothing. The
// quotient c is rounded as a division is: a token equal to its partner has delta = 0.
template <int kLanes>
__device__ Pair pair_of(const Problem& p, const Target& t, float4 zs) {
  Pair out;
  out.inner = dot<kLanes>(t.z, zs);
  const float ratio = out.inner * t.inverse;
  out.ratio = fmaf(fmaf(-ratio, t.square, out.inner), t.inverse, ratio);
  out.delta = add(zs, -out.ratio, t.z);
  out.rest = dot<kLanes>(out.delta, out.delta);
  out.norm = t.length * root(out.rest);
  out.inverse = __fdividef(1.0f, fmaxf(out.norm, p.eps));
  out.scale = out.inverse * t.share;
  return out;
}

template <int kLanes>
__device__ float kappa_of(const Problem& p, const Pair& pair, float4 dy) {
  const float along = dot<kLanes>(dy, pair.delta) * pair.inverse;
  return pair.norm > p.eps ? -pair.scale * pair.inverse * along : 0.0f;
}

// Lanes past the last token stay, since sums need whole warps.
template <int kLanes, bool kAligned>
__global__ void average_kernel(Problem p, float* y_out) {
  const int c = threadIdx.x % kLanes * 4;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int64_t t = position(p, token), at = token * p.rank + c;
  const bool live = token < p.tokens;
  const Target target = target_of<kLanes>(p, load<kAligned>(p.z + at, c, p.rank, live), t);
  float4 y = {0, 0, 0, 0};
#pragma unroll 2
  for (int o = 0; o < p.many; ++o) {
    const bool there = live && p.offsets[o] <= t;
    const Pair pair = pair_of<kLanes>(p, target, load<kAligned>(p.z + at - p.offsets[o] * p.rank, c, p.rank, there));
    y = add(y, pair.scale, pair.delta);
  }
  store<kAligned>(y, c, p.rank, live, y_out + at);
}

// The pairs of a token as target and as source (formulas in plucker.cpp), added to what D y left in dz.
template <int kLanes, bool kAligned>
__global__ void pairs_kernel(Problem p, const float* dy, float* dz) {
  const int c = threadIdx.x % kLanes * 4;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int64_t t = position(p, token), at = token * p.rank + c;
  const bool live = token < p.tokens;
  const float4 z = load<kAligned>(p.z + at, c, p.rank, live), h = load<kAligned>(dy + at, c, p.rank, live);
  const Target own = target_of<kLanes>(p, z, t);
  float4 total = load<kAligned>(dz + at, c, p.rank, live);
#pragma unroll 2
  for (int o = 0; o < p.many; ++o) {
    const bool there = live && p.offsets[o] <= t;
    const Pair pair = pair_of<kLanes>(p, own, load<kAligned>(p.z + at - p.offsets[o] * p.rank, c, p.rank, there));
    const float kappa = kappa_of<kLanes>(p, pair, h);
    total = add(total, kappa * pair.rest, z);
    total = add(total, -kappa * pair.inner, pair.delta);
    total = add(total, -pair.scale * pair.ratio, h);
  }
#pragma unroll 2
  for (int o = 0; o < p.many; ++o) {
    const bool there = live && p.offsets[o] < p.length - t;
    const int64_t later = at + p.offsets[o] * p.rank;
    const float4 ahead = load<kAligned>(dy + later, c, p.rank, there);
    const Target target = target_of<kLanes>(p, load<kAligned>(p.z + later, c, p.rank, there), t + p.offsets[o]);
    const Pair pair = pair_of<kLanes>(p, target, z);
    const float kappa = kappa_of<kLanes>(p, pair, ahead);
    total = add(total, pair.scale, ahead);
    total = add(total, kappa * target.square, pair.delta);
  }
  store<kAligned>(total, c, p.rank, live, dz + at);
}

__device__ void put(float value, float* out) { *out = value; }
__device__ void put(float value, __nv_bfloat16* out) { *out = __float2bfloat16(value); }
__device__ float get(float value) { return value; }
__device__ float get(__nv_bfloat16 value) { return __bfloat162float(value); }

// Shared memory of a warp that makes the wedges of kTokens tokens: (z, y), and its part of the output with up to a vector
// before it, so that both have the same alignment.
template <typename T, int PL>
struct Stage {
  static constexpr int kTokens = 4 / PL, kColumns = kWarp * PL, kVector = sizeof(uint4) / sizeof(T);

  static __host__ __device__ int vectors(int pairs) {
    return kTokens * kColumns * sizeof(float2) / sizeof(uint4) + (kTokens * pairs + 2 * kVector - 2) / kVector;
  }
};

// Pairs (i, j), i < j, in lexicographic order. Row i and row r-2-i have r pairs together: column c has (i, c) where i < c,
// and (r-2-i, r-1-c) elsewhere.
template <typename T, int PL>
__global__ void wedge_kernel(Problem p, const float* y, int64_t base, int64_t stop, T* out) {
  using S = Stage<T, PL>;
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = p.rank;
  const int64_t first = base + (static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp) * S::kTokens;
  if (first >= stop) return;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(S::kTokens), stop - first));
  float2* zy = reinterpret_cast<float2*>(shared + warp * S::vectors(p.pairs));
  T* stage = reinterpret_cast<T*>(zy + S::kTokens * S::kColumns);
  float2 own[S::kTokens][PL], mirrored[S::kTokens][PL];
#pragma unroll
  for (int n = 0; n < S::kTokens; ++n) {
#pragma unroll
    for (int k = 0; k < PL; ++k) {
      const int c = lane + kWarp * k;
      const int64_t at = (first + n) * r + c;
      own[n][k] = n < tokens && c < r ? float2{p.z[at], y[at]} : float2{0, 0};
      zy[n * S::kColumns + c] = own[n][k];
    }
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < S::kTokens; ++n) {
#pragma unroll
    for (int k = 0; k < PL; ++k) mirrored[n][k] = zy[n * S::kColumns + max(r - 1 - lane - kWarp * k, 0)];
  }
  const int64_t begin = (first - base) * p.pairs;
  const int lead = static_cast<int>(begin % S::kVector), size = lead + tokens * p.pairs;
  // Where (i, 0) and (r-2-i, r-1) would be.
  int upper = lead - 1, lower = lead + p.pairs - 1;
  for (int i = 0; 2 * i <= r - 2; ++i) {
#pragma unroll
    for (int k = 0; k < PL; ++k) {
      const int c = lane + kWarp * k;
      const bool above = c > i, there = c < r && (above || 2 * i < r - 2);
      const float2* heads = zy + (above ? i : r - 2 - i);
      T* at = stage + (above ? upper + c : lower - c);
#pragma unroll
      for (int n = 0; n < S::kTokens; ++n) {
        const float2 head = heads[n * S::kColumns], tail = above ? own[n][k] : mirrored[n][k];
        if (there) put(head.x * tail.y - tail.x * head.y, at + n * p.pairs);
      }
    }
    upper += r - 2 - i;
    lower -= i + 1;
  }
  __syncwarp();
  T* to = out + begin - lead;
  for (int v = lane * S::kVector; v < size; v += kWarp * S::kVector) {
    if (v >= lead && v + S::kVector <= size) {
      *reinterpret_cast<uint4*>(to + v) = *reinterpret_cast<const uint4*>(stage + v);
    } else {
      for (int k = max(v, lead); k < min(v + S::kVector, size); ++k) to[k] = stage[k];
    }
  }
}

// dz = D y and dy = -D z, for squares of D's upper triangle: a lane has a column as the square comes from memory, a row as it
// comes back from shared memory.
template <typename T, int PL>
__global__ void wedge_backward_kernel(Problem p, const float* y, int64_t base, int64_t stop, const T* grad, float* dz_out,
                                      float* dy_out) {
  constexpr int kStep = 8;
  __shared__ float squares[kWarps][kWarp][kWarp + 1];
  __shared__ float4 couples[kWarps][kWarp * PL / 2];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = p.rank;
  const int64_t token = base + static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= stop) return;
  float(*square)[kWarp + 1] = squares[warp];
  float2* zy = reinterpret_cast<float2*>(couples[warp]);
  float dz[PL] = {}, dy[PL] = {};
#pragma unroll
  for (int k = 0; k < PL; ++k) {
    const int c = lane + kWarp * k;
    zy[c] = c < r ? float2{p.z[token * r + c], y[token * r + c]} : float2{0, 0};
  }
  __syncwarp();
  // One address a lane and 32-bit distances from it.
  const char* triangle = reinterpret_cast<const char*>(grad + static_cast<int64_t>(blockIdx.x) * kWarps * p.pairs);
#pragma unroll
  for (int a = 0; a < PL; ++a) {
#pragma unroll
    for (int b = a; b < PL; ++b) {
      const int j = kWarp * b + lane, height = min(r - kWarp * a, kWarp), width = min(r - kWarp * b, kWarp);
      // Where (i, j) is, and from there to (i+1, j).
      uint32_t at = (warp * p.pairs + kWarp * a * (2 * r - kWarp * a - 1) / 2 + j - kWarp * a - 1) * sizeof(T);
      uint32_t step = (r - 2 - kWarp * a) * sizeof(T);
      for (int rows = 0; width > 0 && rows < height; rows += kStep) {
        float g[kStep];
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          const int i = kWarp * a + rows + k;
          g[k] = (a < b || i < j) && j < r ? get(*reinterpret_cast<const T*>(triangle + at)) : 0.0f;
          at += step;
          step -= sizeof(T);
        }
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          const float2 head = zy[kWarp * a + rows + k];
          square[rows + k][lane] = g[k];
          dz[b] -= g[k] * head.y;
          dy[b] += g[k] * head.x;
        }
      }
      __syncwarp();
      for (int columns = 0; columns < width; columns += kStep) {
#pragma unroll
        for (int k = 0; k < kStep; k += 2) {
          const float4 two = couples[warp][(kWarp * b + columns + k) / 2];
          const float g = square[lane][columns + k], next = square[lane][columns + k + 1];
          dz[a] += g * two.y;
          dy[a] -= g * two.x;
          dz[a] += next * two.w;
          dy[a] -= next * two.z;
        }
      }
      __syncwarp();
    }
  }
#pragma unroll
  for (int k = 0; k < PL; ++k) {
    const int c = lane + kWarp * k;
    if (c >= r) continue;
    dz_out[token * r + c] = dz[k];
    dy_out[token * r + c] = dy[k];
  }
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
            static_cast<float>(eps), z.size(2) % 4 == 0 && reinterpret_cast<uintptr_t>(data<float>(z)) % 16 == 0,
            0, {}};
  for (size_t k = 0; k < offsets.size(); ++k) {
    p.offsets[k] = std::min(offsets[k], p.length);  // far ones must not overflow
    p.reach = std::max(p.reach, p.offsets[k]);
  }
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

// Calls f with the lanes that share a row, and whether they load it as vectors.
template <typename F>
void with_rows(const Problem& p, F f) {
  with_lanes(p, [&](auto lanes) {
    constexpr std::integral_constant<int, decltype(lanes)::value * kWarp / 4> row;
    if (p.aligned) f(row, std::true_type());
    else f(row, std::false_type());
  });
}

Tensor averages(const Problem& p, const Tensor& z) {
  const Tensor y = empty(z, {p.tokens, p.rank}, ScalarType::Float);
  if (p.tokens == 0) return y;
  with_rows(p, [&](auto lanes, auto aligned) {
    average_kernel<decltype(lanes)::value, decltype(aligned)::value>
        <<<blocks(p.tokens, kThreads / lanes), kThreads, 0, stream(z)>>>(p, data<float>(y));
  });
  return y;
}

template <typename T>
void write_wedges(const Problem& p, const Tensor& y, int64_t base, int64_t stop, const Tensor& out) {
  with_lanes(p, [&](auto lanes) {
    constexpr int PL = decltype(lanes)::value;
    using S = Stage<T, PL>;
    const int bytes = S::vectors(p.pairs) * static_cast<int>(sizeof(uint4));
    const int warps = std::clamp(kShared / bytes, 1, kWarps);
    wedge_kernel<T, PL><<<blocks(stop - base, warps * S::kTokens), warps * kWarp, warps * bytes, stream(out)>>>(
        p, data<float>(y), base, stop, data<T>(out));
  });
}

template <typename T>
Tensor forward(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& offsets, double eps) {
  const Problem p = problem(z, weight, offsets, eps);
  if (p.tokens == 0 || p.dim == 0) return empty(z, {z.size(0), z.size(1), p.dim}, kDtype<T>);
  Tensor out = empty(z, {p.tokens, p.dim}, kDtype<T>);
  const Tensor wedges = empty(z, {std::min(kChunk, p.tokens), p.pairs}, kDtype<T>), y = averages(p, z);
  for (int64_t base = 0; base < p.tokens; base += kChunk) {
    const int64_t stop = std::min(base + kChunk, p.tokens);
    write_wedges<T>(p, y, base, stop, wedges);
    const Tensor o = rows(out, base, stop), tile = rows(wedges, 0, stop - base), w = torch::stable::transpose(weight, 0, 1);
    if (bias) addmm(o, *bias, tile, w);
    else mm(o, tile, w);
  }
  if (bias) {
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
  if (numel == 0) return;
  add_kernel<T><<<blocks(numel, 256), 256, 0, stream(total)>>>(data<float>(total), data<T>(part), numel, first);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& z, const Tensor& weight,
                                    const std::vector<int64_t>& offsets, double eps, bool need_z, bool need_weight) {
  const Problem p = problem(z, weight, offsets, eps);
  const Tensor flat = torch::stable::view(grad, {p.tokens, p.dim});
  const int64_t chunk = std::min(kChunk, p.tokens);
  const auto room = [&](bool needed, std::vector<int64_t> sizes, ScalarType dtype) {
    return empty(z, needed ? sizes : std::vector<int64_t>{0}, dtype);
  };
  const Tensor dz = room(need_z, {z.size(0), z.size(1), p.rank}, ScalarType::Float);
  const Tensor y = averages(p, z), dy = room(need_z, {p.tokens, p.rank}, ScalarType::Float);
  Tensor dweight = room(need_weight, {p.dim, p.pairs}, ScalarType::Float);
  // The first chunk's product is written, not added.
  if (p.tokens == 0) torch::stable::zero_(dweight);
  const Tensor part = room(need_weight, {p.dim, p.pairs}, kDtype<T>);
  const Tensor wedges = empty(z, {chunk, p.pairs}, kDtype<T>);
  for (int64_t base = 0; base < p.tokens; base += kChunk) {
    const int64_t stop = std::min(base + kChunk, p.tokens);
    const Tensor g = rows(flat, base, stop), tile = rows(wedges, 0, stop - base);
    if (need_weight) {
      write_wedges<T>(p, y, base, stop, wedges);
      add_weight_gradient<T>(dweight, part, g, tile, base == 0);
    }
    if (!need_z) continue;
    mm(tile, g, weight);
    with_lanes(p, [&](auto lanes) {
      wedge_backward_kernel<T, decltype(lanes)::value><<<blocks(stop - base, kWarps), kThreads, 0, stream(z)>>>(
          p, data<float>(y), base, stop, data<T>(wedges), data<float>(dz), data<float>(dy));
    });
  }
  if (need_z && p.tokens > 0) {
    with_rows(p, [&](auto lanes, auto aligned) {
      pairs_kernel<decltype(lanes)::value, decltype(aligned)::value>
          <<<blocks(p.tokens, kThreads / lanes), kThreads, 0, stream(z)>>>(p, data<float>(dy), data<float>(dz));
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
