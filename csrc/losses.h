// What losses over many classes share: a batch in chunks of rows, so that what is wide is alive for one chunk alone, and the
// gradients that the chunks add up to.
#pragma once

#include "linear.h"
#include "vec.h"

namespace grassland {

// Columns whose terms are added in float32; their sums are added in float64.
constexpr int64_t kBlock = 4096;

// Of a row's logits less their peak: the sums of their exponentials and of themselves, and of the weights q, alone and
// times the logits.
struct Sums {
  double powers = 0, along = 0, mass = 0, hit = 0;
};

// A chunk has as many bytes as malloc hands back without asking the system, or as the weight, whose gradient would be summed
// for each chunk more; and enough rows for an efficient product.
constexpr int64_t kChunkBytes = 31 << 20;
constexpr int64_t kChunkRows = 128;

// use(base, stop, x weight^T) for chunks of about the same size of the rows of x (rows, n), weight (width, n), one after the
// other in the same memory.
template <typename T, typename F>
void each_chunk(const Tensor& x, const Tensor& weight, const F& use) {
  const int64_t total = x.size(0), width = weight.size(0);
  const int64_t limit = std::max<int64_t>(kChunkBytes / static_cast<int64_t>(sizeof(T)) / width, weight.size(1));
  const int64_t most = std::max(kChunkRows, limit), count = (total + most - 1) / most;
  if (count == 0) return;
  const Tensor room = empty(x, {(total + count - 1) / count, width}, kDtype<T>);
  use_large_pages(room);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t base = total * k / count, stop = total * (k + 1) / count;
    const Tensor into = rows(room, 0, stop - base);
    use(base, stop, linear(rows(x, base, stop), weight, nullptr, &into));
  }
}

// The sum of the rows' losses, a float32 scalar.
inline Tensor total_of(const Tensor& like, const std::vector<double>& losses) {
  const Tensor out = empty(like, {}, ScalarType::Float);
  double total = 0;
  for (const double loss : losses) total += loss;
  *data<float>(out) = static_cast<float>(total);
  return out;
}

// dx = dz W and dW = dz^T x of x (rows, n) from the chunks' dz; float32, or in the dtype of x and of the weight.
class Gradients {
 public:
  Gradients(const Tensor& x, const Tensor& weight, bool need_x, bool need_weight, ScalarType dx = ScalarType::Float,
            ScalarType dweight = ScalarType::Float)
      : x_(x), weight_(weight), need_x_(need_x), need_weight_(need_weight), dtype_(dweight),
        dx_(empty(x, need_x ? std::vector<int64_t>{x.size(0), x.size(1)} : std::vector<int64_t>{0}, dx)),
        dweight_(weight.size(0), weight.size(1), dweight) {}

  bool needed() const { return need_x_ || need_weight_; }

  void add(int64_t base, int64_t stop, const Tensor& dz) {
    if (need_x_) put(linear(dz, flipped(weight_)), rows(dx_, base, stop));
    if (need_weight_) dweight_.add(dz, rows(x_, base, stop));
  }

  // Empty (0) where not needed.
  const Tensor& dx() const { return dx_; }
  Tensor dweight() { return need_weight_ ? dweight_.result(x_) : empty(x_, {0}, dtype_); }

 private:
  Tensor x_, weight_;
  bool need_x_, need_weight_;
  ScalarType dtype_;
  Tensor dx_;
  OuterSum dweight_;
};

}  // namespace grassland
