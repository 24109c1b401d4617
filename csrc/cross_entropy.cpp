// Cross entropy of a linear head on the CPU: l = x W^T, loss = log sum exp(l) - (1 - s) l_y - s mean(l), and in place
// l <- softmax(l) - (1 - s) onehot - s / V. A chunk of logits lives for its three products, and a row stays in the cache
// between its passes. Where no gradient is wanted the logits never leave the cache.
#include "losses.h"

#include <cmath>
#include <limits>
#include <type_traits>

namespace grassland {
namespace {

struct Softmax {
  int64_t vocab;
  const int64_t* target;
  float share, smoothing;
  int64_t ignore;
};

// What some of a row's logits say of its loss: the sums of their exponentials and of themselves, less their peak, and the
// logit of its class if it is among them.
struct Partial {
  int64_t count = 0;
  float peak = 0;
  double powers = 0, along = 0, hit = 0;

  void extend(const Partial& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const float top = std::max(peak, other.peak);
    powers = powers_below(top) + other.powers_below(top);
    along = along_below(top) + other.along_below(top);
    hit += other.hit;
    count += other.count;
    peak = top;
  }

 private:
  double less(float top) const { return static_cast<double>(peak) - top; }
  double powers_below(float top) const { return powers == 0 || peak == top ? powers : powers * std::exp(less(top)); }
  double along_below(float top) const { return peak == top ? along : along + static_cast<double>(count) * less(top); }
};

#define GRASSLAND_SOURCE "cross_entropy_rows.h"
#include "units.h"

// Columns and rows of logits that stay in the cache.
constexpr int64_t kTileColumns = 512, kTileRows = 256;

template <typename T>
std::vector<double> losses_alone(const Tensor& x, const Tensor& weight, const Softmax& s) {
  const int64_t total = x.size(0), threads = torch::stable::get_num_threads();
  std::vector<double> losses(total);
  if (total == 0) return losses;
  const int64_t parts = std::max<int64_t>(1, std::min(threads, s.vocab / kTileColumns));
  const int64_t chunks = std::max((total + kTileRows - 1) / kTileRows, (threads + parts - 1) / parts);
  std::vector<Partial> found(parts * total);
  torch::stable::parallel_for(0, parts * chunks, 1, [&](int64_t begin, int64_t end) {
    const Alone alone;
    const Tensor room = empty(x, {kTileRows * kTileColumns}, kDtype<T>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / chunks, base = i % chunks * total / chunks, stop = (i % chunks + 1) * total / chunks;
      const int64_t left = part * s.vocab / parts, right = (part + 1) * s.vocab / parts;
      for (int64_t first = left; first < right && base < stop; first += kTileColumns) {
        const int64_t last = std::min(first + kTileColumns, right), width = last - first;
        const Tensor into = torch::stable::view(rows(room, 0, (stop - base) * width), {stop - base, width});
        const Tensor logits = linear(rows(x, base, stop), rows(weight, first, last), nullptr, &into);
        GRASSLAND_BEST(extend_rows)(s, base, stop, first, width, data<T>(logits), found.data() + part * total);
      }
    }
  });
  for (int64_t i = total; i < parts * total; ++i) found[i % total].extend(found[i]);
  GRASSLAND_BEST(put_losses)(s, found, losses);
  return losses;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& x, const Tensor& weight, const Tensor& target, double share,
                                        double smoothing, int64_t ignore_index, bool need_x, bool need_weight, bool wide) {
  Gradients gradients(x, weight, need_x, need_weight, kDtype<T>, wide ? ScalarType::Float : kDtype<T>);
  const Softmax s{weight.size(0), data<int64_t>(target), static_cast<float>(share), static_cast<float>(smoothing),
                  ignore_index};
  if (!gradients.needed()) return {total_of(x, losses_alone<T>(x, weight, s)), gradients.dx(), gradients.dweight()};
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / s.vocab);
  std::vector<double> losses(x.size(0));
  each_chunk<T>(x, weight, [&](int64_t base, int64_t stop, const Tensor& logits) {
    torch::stable::parallel_for(base, stop, grain, [&](int64_t begin, int64_t end) {
      GRASSLAND_BEST(softmax_rows)(s, base, begin, end, data<T>(logits), losses.data());
    });
    gradients.add(base, stop, logits);
  });
  return {total_of(x, losses), gradients.dx(), gradients.dweight()};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                            double share, double smoothing, int64_t ignore_index,
                                                            bool need_x, bool need_weight, bool wide) {
  const auto run = is_half(x) ? loss<bf16> : loss<float>;
  return run(x, weight, target, share, smoothing, ignore_index, need_x, need_weight, wide);
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous by kernels/cross_entropy/op.py: x and weight float32 or bfloat16 alike, int64
// classes in range or ignored. The loss is summed, float32; the gradients are times `share` and of the inputs' dtype,
// that of the weight float32 if `wide`.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, float share, float smoothing, int ignore_index, "
      "bool need_x, bool need_weight, bool wide) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&grassland::linear_cross_entropy_cpu));
}
