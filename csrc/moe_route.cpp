// Routing on the CPU (arXiv 2107.11817): softmax over all experts, top-K, a stable counting sort, the balance loss.
#include "common.h"

namespace grassland {
namespace {

constexpr int64_t kGrain = 512;

struct Shape {
  int64_t tokens, experts, top_k;
};

GRASSLAND_INLINE void softmax(const float* logits, int64_t n, float* out) {
  float top = logits[0];
  // One float32 term behind the other, hundreds of experts lose digits.
  double sum = 0;
  for (int64_t e = 1; e < n; ++e) top = std::max(top, logits[e]);
  for (int64_t e = 0; e < n; ++e) sum += out[e] = std::exp(logits[e] - top);
  const float total = static_cast<float>(sum);
  for (int64_t e = 0; e < n; ++e) out[e] /= total;
}

// As where PyTorch sorts: a NaN is the largest.
bool larger(float a, float b) { return a > b || (a != a && b == b); }

// The K largest logits, the lower expert first among equals.
void choose(const float* logits, const Shape& s, std::vector<char>& taken, int64_t* chosen) {
  std::fill(taken.begin(), taken.end(), 0);
  for (int64_t k = 0; k < s.top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < s.experts; ++e)
      if (!taken[e] && (best < 0 || larger(logits[e], logits[best]))) best = e;
    taken[best] = 1;
    chosen[k] = best;
  }
}

void token_rows(const float* logits, const Shape& s, bool renormalize, int64_t begin, int64_t end, float* probabilities,
                float* gates, int64_t* chosen) {
  std::vector<char> taken(s.experts);
  for (int64_t t = begin; t < end; ++t) {
    float *p = probabilities + t * s.experts, *g = gates + t * s.top_k;
    int64_t* c = chosen + t * s.top_k;
    softmax(logits + t * s.experts, s.experts, p);
    choose(logits + t * s.experts, s, taken, c);
    float sum = 0;
    for (int64_t k = 0; k < s.top_k; ++k) sum += g[k] = p[c[k]];
    for (int64_t k = 0; renormalize && k < s.top_k; ++k) g[k] /= sum;
  }
}

using Parts = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Parts moe_route_cpu(const Tensor& logits, std::optional<Tensor> mask, int64_t top_k, int64_t capacity,
                    bool renormalize) {
  const Shape s{logits.size(0), logits.size(1), top_k};
  const int64_t pairs = s.tokens * top_k;
  const Tensor gates = empty(logits, {s.tokens, top_k}, ScalarType::Float);
  const Tensor probabilities = empty(logits, {s.tokens, s.experts}, ScalarType::Float);
  const Tensor experts = empty(logits, {s.tokens, top_k}, ScalarType::Long);
  const Tensor slots = empty(logits, {s.tokens, top_k}, ScalarType::Long);
  const Tensor order = empty(logits, {pairs}, ScalarType::Long);
  const Tensor offsets = zeros(logits, {s.experts + 1}, ScalarType::Long);
  const Tensor counts = zeros(logits, {s.experts}, ScalarType::Long);
  const Tensor balance = zeros(logits, {}, ScalarType::Float);
  torch::stable::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
    token_rows(data<float>(logits), s, renormalize, begin, end, data<float>(probabilities), data<float>(gates),
               data<int64_t>(experts));
  });
  const bool* live = mask ? data<bool>(*mask) : nullptr;
  const int64_t* chosen = data<int64_t>(experts);
  int64_t *count = data<int64_t>(counts), *first = data<int64_t>(offsets), *slot = data<int64_t>(slots);
  int64_t routed = 0;
  std::vector<double> sums(s.experts, 0.0);
  for (int64_t t = 0; t < s.tokens; ++t) {
    if (live != nullptr && !live[t]) continue;
    ++routed;
    for (int64_t e = 0; e < s.experts; ++e) sums[e] += data<float>(probabilities)[t * s.experts + e];
    for (int64_t k = 0; k < top_k; ++k) ++count[chosen[t * top_k + k]];
  }
  double total = 0;
  for (int64_t e = 0; e < s.experts; ++e) {
    first[e + 1] = first[e] + (capacity < 0 ? count[e] : std::min(count[e], capacity));
    total += static_cast<double>(count[e]) * sums[e];
  }
  const double n = static_cast<double>(std::max<int64_t>(routed, 1));
  *data<float>(balance) = static_cast<float>(total * s.experts / (n * n * top_k));
  std::vector<int64_t> next(first, first + s.experts);
  std::fill_n(data<int64_t>(order), pairs, -1);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t e = chosen[pair];
    const bool kept = (live == nullptr || live[pair / top_k]) && next[e] < first[e + 1];
    slot[pair] = kept ? next[e]++ : -1;
    if (kept) data<int64_t>(order)[slot[pair]] = pair;
  }
  return {gates, balance, experts, slots, order, offsets, counts, probabilities};
}

// dlogit = p (dp - <dp, p>), dp = d gate at the chosen experts + d balance E m_e / T
Tensor moe_route_backward_cpu(const Tensor& grad_gates, const Tensor& grad_balance, const Tensor& probabilities,
                              const Tensor& experts, const Tensor& counts, std::optional<Tensor> mask,
                              bool renormalize) {
  const Shape s{probabilities.size(0), probabilities.size(1), experts.size(1)};
  const Tensor out = empty(probabilities, {s.tokens, s.experts}, ScalarType::Float);
  const bool* live = mask ? data<bool>(*mask) : nullptr;
  const int64_t routed = live == nullptr ? s.tokens : std::count(live, live + s.tokens, true);
  const double n = static_cast<double>(std::max<int64_t>(routed, 1));
  std::vector<float> slope(s.experts), dp(s.experts);
  for (int64_t e = 0; e < s.experts; ++e)
    slope[e] = static_cast<float>(*data<float>(grad_balance) * s.experts * data<int64_t>(counts)[e] / (n * n * s.top_k));
  for (int64_t t = 0; t < s.tokens; ++t) {
    const float *p = data<float>(probabilities) + t * s.experts, *g = data<float>(grad_gates) + t * s.top_k;
    const int64_t* c = data<int64_t>(experts) + t * s.top_k;
    float total = 1, mean = 0;
    double inner = 0;
    if (renormalize) {
      total = 0;
      for (int64_t k = 0; k < s.top_k; ++k) total += p[c[k]];
      for (int64_t k = 0; k < s.top_k; ++k) mean += g[k] * p[c[k]] / total;
    }
    for (int64_t e = 0; e < s.experts; ++e) dp[e] = live == nullptr || live[t] ? slope[e] : 0.0f;
    for (int64_t k = 0; k < s.top_k; ++k) dp[c[k]] += (g[k] - mean) / total;
    for (int64_t e = 0; e < s.experts; ++e) inner += dp[e] * p[e];
    const float common = static_cast<float>(inner);
    for (int64_t e = 0; e < s.experts; ++e) data<float>(out)[t * s.experts + e] = p[e] * (dp[e] - common);
  }
  return out;
}

}  // namespace
}  // namespace grassland

// All tensors contiguous, logits and probabilities float32, mask bool. Results as in kernels/moe/routing.py.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "moe_route(Tensor logits, Tensor? mask, int top_k, int capacity, bool renormalize) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor grad_gates, Tensor grad_balance, Tensor probabilities, Tensor experts, Tensor counts, "
      "Tensor? mask, bool renormalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&grassland::moe_route_cpu));
  m.impl("moe_route_backward", TORCH_BOX(&grassland::moe_route_backward_cpu));
}
