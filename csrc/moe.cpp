// Grouped experts on the CPU (arXiv 2107.11817; algebra in kernels/moe/eager.py).
//
// Rows are gathered into the order of the slots; the products of an expert are those of linear.h, and what stands between
// them (gather, bias, GELU, dropout, gate, combination) is one pass each. Experts run side by side, a thread each, if that
// divides the work evenly, else one after the other on all threads. Sums run in a fixed order.
#include "linear.h"
#include "vec.h"

#include <numeric>
#include <type_traits>
#include <utility>

namespace grassland {
namespace {

constexpr int64_t kGrain = 16;

struct Shape {
  int64_t tokens, top_k, experts, dim, inner, pairs;
};

// Dropout of one matrix of rows: element c of a pair's row is zero if its hash is below the threshold.
struct Dropout {
  uint32_t seed, threshold;
  float scale;
  bool on;
};

#define GRASSLAND_SOURCE "moe_rows.h"
#include "units.h"

template <typename F>
void parallel(int64_t n, int64_t grain, const F& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

Tensor expert(const Tensor& stacked, int64_t e) {
  Tensor base = stacked;
  return torch::stable::select(base, 0, e);
}

template <typename T>
Tensor gather(const Tensor& x, const int64_t* order, const Shape& s, int64_t rows) {
  const Tensor out = empty(x, {rows, s.dim}, kDtype<T>);
  const T* from = data<T>(x);
  T* to = data<T>(out);
  parallel(rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::copy_n(from + order[r] / s.top_k * s.dim, s.dim, to + r * s.dim);
  });
  return out;
}

// Where each expert's rows begin and end. What is no routing must not lead outside of the tensors.
struct Sizes {
  std::vector<int64_t> bounds;
  int64_t rows;
  Sizes(const Tensor& offsets, const Tensor& slots, const Tensor& order, int64_t experts)
      : bounds(data<int64_t>(offsets), data<int64_t>(offsets) + experts + 1), rows(bounds.back()) {
    const int64_t pairs = slots.numel(), *slot = data<int64_t>(slots), *pair = data<int64_t>(order);
    bool right = bounds.front() == 0 && rows <= pairs && std::is_sorted(bounds.begin(), bounds.end());
    for (int64_t p = 0; p < pairs; ++p) right &= slot[p] < rows;
    for (int64_t r = 0; right && r < rows; ++r) right = pair[r] >= 0 && pair[r] < pairs;
    STD_TORCH_CHECK(right, "slots, order and offsets must be those of one moe_route");
  }
};

Shape shape_of(const Tensor& x, const Tensor& slots, const Tensor& w_up) {
  return {x.size(0), slots.size(1), w_up.size(0), x.size(1), w_up.size(1), slots.numel()};
}

Dropout dropout_of(const std::optional<Tensor>& seed, double rate, uint32_t salt) {
  if (!seed) return {0, 0, 1.0f, false};
  const uint32_t low = static_cast<uint32_t>(*data<int64_t>(*seed)) ^ salt;
  return {low, static_cast<uint32_t>(rate * 4294967296.0), static_cast<float>(1.0 / (1.0 - rate)), true};
}

constexpr uint32_t kOutputSalt = 0x9e3779b9u;

// No memset here, and no memcpy of rows: an empty tensor has no address.
void clear(const Tensor& x) { std::fill_n(data<char>(x), x.numel() * x.element_size(), 0); }

template <typename T>
void zero_tail(const Tensor& x, int64_t rows) {
  std::fill_n(data<T>(x) + rows * x.size(1), x.numel() - rows * x.size(1), T{});
}

// Runs an expert, for all of them that have rows. Reading and writing the weights is worth so many rows.
constexpr int64_t kWeightRows = 24;

template <typename F>
void each_expert(const Sizes& sizes, const F& run) {
  std::vector<std::pair<int64_t, int64_t>> work;
  for (size_t e = 0; e + 1 < sizes.bounds.size(); ++e)
    if (const int64_t n = sizes.bounds[e + 1] - sizes.bounds[e]; n > 0) work.emplace_back(n + kWeightRows, e);
  std::sort(work.rbegin(), work.rend());
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<std::vector<int64_t>> share(threads);
  std::vector<int64_t> load(threads, 0);
  for (const auto& [cost, e] : work) {
    const int64_t least = std::min_element(load.begin(), load.end()) - load.begin();
    share[least].push_back(e);
    load[least] += cost;
  }
  const int64_t most = *std::max_element(load.begin(), load.end());
  if (5 * most * threads > 6 * std::accumulate(load.begin(), load.end(), int64_t{0})) {
    for (const auto& [cost, e] : work) run(e);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const Alone alone;
    for (int64_t t = begin; t < end; ++t)
      for (const int64_t e : share[t]) run(e);
  });
}

Tensor swapped(const Tensor& stacked) {
  Tensor base = stacked;
  return torch::stable::transpose(base, 1, 2);
}

std::vector<Tensor> experts_of(const Tensor& stacked) {
  std::vector<Tensor> found;
  for (int64_t e = 0; e < stacked.size(0); ++e) found.push_back(expert(stacked, e));
  return found;
}

std::vector<Tensor> experts_of(const std::optional<Tensor>& stacked) {
  return stacked ? experts_of(*stacked) : std::vector<Tensor>{};
}

// The rows of all experts by slot, and the tensors that hold them.
template <typename T>
struct Rows {
  std::vector<Tensor> tensors;
  std::vector<const T*> pointers;
  explicit Rows(const Sizes& sizes) : tensors(sizes.bounds.size()), pointers(sizes.rows) {}
  void set(int64_t e, int64_t begin, Tensor x) {
    for (int64_t r = 0; r < x.size(0); ++r) pointers[begin + r] = data<T>(x) + r * x.size(1);
    tensors[e] = std::move(x);
  }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& gates, const Tensor& slots,
                                           const Tensor& order, const Tensor& offsets, const Tensor& w_up,
                                           const Tensor& b_up, const Tensor& w_down, const Tensor& b_down, double rate,
                                           const std::optional<Tensor>& seed, bool act, bool save) {
  const Shape s = shape_of(x, slots, w_up);
  const Sizes sizes(offsets, slots, order, s.experts);
  const Dropout inner = dropout_of(seed, rate, 0), outer = dropout_of(seed, rate, kOutputSalt);
  const int64_t* pairs = data<int64_t>(order);
  const Tensor h = empty(x, {save ? s.pairs : 0, s.inner}, kDtype<T>);
  const Tensor o = empty(x, {save && act ? s.pairs : 0, s.dim}, kDtype<T>);
  use_large_pages(h);
  const std::vector<Tensor> ups = experts_of(w_up), up_biases = experts_of(b_up);
  const std::vector<Tensor> downs = experts_of(w_down), down_biases = experts_of(b_down);
  Rows<T> out(sizes);
  each_expert(sizes, [&](int64_t e) {
    const int64_t begin = sizes.bounds[e], n = sizes.bounds[e + 1] - begin;
    const Tensor a = linear(gather<T>(x, pairs + begin, s, n), ups[e], &up_biases[e]);
    T* kept = save ? data<T>(h) + begin * s.inner : nullptr;
    parallel(n, kGrain, [&](int64_t first, int64_t last) {
      GRASSLAND_BEST(up_rows)(pairs + begin, inner, s.inner, first, last, data<T>(a), kept);
    });
    out.set(e, begin, linear(a, downs[e], &down_biases[e]));
    if (save && act) std::copy_n(out.pointers[begin], n * s.dim, data<T>(o) + begin * s.dim);
  });
  const Tensor y = empty(x, {s.tokens, s.dim}, kDtype<T>);
  parallel(s.tokens, kGrain, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(combine)(out.pointers.data(), data<float>(gates), data<int64_t>(slots), outer, act, s, begin, end,
                            data<T>(y));
  });
  if (save) zero_tail<T>(h, sizes.rows);
  if (save && act) zero_tail<T>(o, sizes.rows);
  return {y, h, o};
}

template <typename T>
void bias_gradient(const Tensor& x, const float* gates, const int64_t* order, int64_t n, float* out) {
  const int64_t width = x.size(1);
  parallel(width, 128, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(column_sums)(data<T>(x), gates, order, n, width, begin, end, out);
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& gates,
                                                    const Tensor& slots, const Tensor& order, const Tensor& offsets,
                                                    const Tensor& w_up, const Tensor& w_down, const Tensor& b_down,
                                                    const Tensor& h, const Tensor& o, double rate,
                                                    const std::optional<Tensor>& seed, bool act,
                                                    const std::optional<Tensor>& total_up,
                                                    const std::optional<Tensor>& total_down, bool accumulate) {
  const Shape s = shape_of(x, slots, w_up);
  const Sizes sizes(offsets, slots, order, s.experts);
  const Dropout inner = dropout_of(seed, rate, 0), outer = dropout_of(seed, rate, kOutputSalt);
  const float* gate = data<float>(gates);
  const Tensor dgates = zeros(x, {s.tokens, s.top_k}, ScalarType::Float);
  const Tensor db_up = empty(x, {s.experts, s.inner}, ScalarType::Float);
  const Tensor db_down = empty(x, {s.experts, s.dim}, ScalarType::Float);
  for (const auto& total : {total_up, total_down})
    if (total && !accumulate) use_large_pages(*total);
  const std::vector<Tensor> ups = experts_of(swapped(w_up)), downs = experts_of(swapped(w_down));
  const std::vector<Tensor> up_totals = experts_of(total_up), down_totals = experts_of(total_down);
  for (int64_t e = 0; e < s.experts; ++e) {
    if (sizes.bounds[e + 1] > sizes.bounds[e]) continue;
    for (const Tensor& bias : {db_up, db_down}) clear(expert(bias, e));
    for (const auto& total : {up_totals, down_totals})
      if (!total.empty() && !accumulate) clear(total[e]);
  }
  Rows<T> dsorted(sizes);
  each_expert(sizes, [&](int64_t e) {
    const int64_t begin = sizes.bounds[e], n = sizes.bounds[e + 1] - begin;
    const int64_t* pairs = data<int64_t>(order) + begin;
    const Tensor g = empty(x, {n, s.dim}, kDtype<T>), a = empty(x, {n, s.inner}, kDtype<T>);
    const T* outputs = act ? data<T>(o) + begin * s.dim : nullptr;
    parallel(n, kGrain, [&](int64_t first, int64_t last) {
      GRASSLAND_BEST(output_backward)(data<T>(grad), outputs, data<T>(b_down) + e * s.dim, pairs, outer, act, s, first,
                                      last, data<T>(g), data<float>(dgates));
    });
    const Tensor d = linear(g, downs[e]);
    parallel(n, kGrain, [&](int64_t first, int64_t last) {
      GRASSLAND_BEST(down_backward)(data<T>(h) + begin * s.inner, gate, pairs, inner, act, s.inner, first, last,
                                    data<T>(d), data<T>(a), data<float>(dgates));
    });
    if (total_down) outer_product(down_totals[e], g, a, accumulate);
    if (total_up) outer_product(up_totals[e], d, gather<T>(x, pairs, s, n), accumulate);
    bias_gradient<T>(d, nullptr, pairs, n, data<float>(db_up) + e * s.inner);
    bias_gradient<T>(g, gate, pairs, n, data<float>(db_down) + e * s.dim);
    dsorted.set(e, begin, linear(d, ups[e]));
  });
  const Tensor dx = empty(x, {s.tokens, s.dim}, kDtype<T>);
  const Dropout off{0, 0, 1.0f, false};
  const float* no_gates = nullptr;
  parallel(s.tokens, kGrain, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(combine)(dsorted.pointers.data(), no_gates, data<int64_t>(slots), off, false, s, begin, end,
                            data<T>(dx));
  });
  return {dx, dgates, db_up, db_down};
}

std::tuple<Tensor, Tensor, Tensor> moe_ffn_cpu(const Tensor& x, const Tensor& gates, const Tensor& slots,
                                               const Tensor& order, const Tensor& offsets, const Tensor& w_up,
                                               const Tensor& b_up, const Tensor& w_down, const Tensor& b_down,
                                               double rate, std::optional<Tensor> seed, bool act, bool save) {
  const auto run = is_half(x) ? forward<bf16> : forward<float>;
  return run(x, gates, slots, order, offsets, w_up, b_up, w_down, b_down, rate, seed, act, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_ffn_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& slots, const Tensor& order,
    const Tensor& offsets, const Tensor& w_up, const Tensor& w_down, const Tensor& b_down, const Tensor& h,
    const Tensor& o, double rate, std::optional<Tensor> seed, bool act, std::optional<Tensor> total_up,
    std::optional<Tensor> total_down, bool accumulate) {
  const auto run = is_half(x) ? backward<bf16> : backward<float>;
  return run(grad, x, gates, slots, order, offsets, w_up, w_down, b_down, h, o, rate, seed, act, total_up, total_down,
             accumulate);
}

}  // namespace
}  // namespace grassland

// All tensors contiguous and of the dtype of x, float32 or bfloat16, but gates float32, indices int64. The totals are the
// gradients of w_up and w_down, of the dtype of x or float32; they are overwritten, or added to if `accumulate`, and not
// computed where there is none.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "moe_ffn(Tensor x, Tensor gates, Tensor slots, Tensor order, Tensor offsets, Tensor w_up, Tensor b_up, "
      "Tensor w_down, Tensor b_down, float rate, Tensor? seed, bool gelu_out, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "moe_ffn_backward(Tensor grad, Tensor x, Tensor gates, Tensor slots, Tensor order, Tensor offsets, Tensor w_up, "
      "Tensor w_down, Tensor b_down, Tensor h, Tensor o, float rate, Tensor? seed, bool gelu_out, "
      "Tensor(a!)? total_up, Tensor(b!)? total_down, bool accumulate) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("moe_ffn", TORCH_BOX(&grassland::moe_ffn_cpu));
  m.impl("moe_ffn_backward", TORCH_BOX(&grassland::moe_ffn_backward_cpu));
}
