// The rows of cross_entropy.cpp, for each vector unit.
#include "losses_rows.h"

// The loss of the row l, which becomes its gradient times s.share; NaN for a NaN logit, and the gradient, too. room: l itself,
// or room for as many float32.
template <typename T>
GRASSLAND_INLINE double softmax_row(const Softmax& s, int64_t label, T* l, float* room) {
  const float peak = largest(l, s.vocab);
  const double hit = to_float(l[label]) - peak;
  const auto below = [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA { return load(l + c, live) - peak; };
  const Sums sums = exponentials<false>(s.vocab, s.grad ? room : nullptr, nullptr, below);
  if (s.grad) {
    const float scale = static_cast<float>(1 / sums.powers);
    const float shift = s.smoothing / static_cast<float>(s.vocab);
    const float drop = (room[label] * scale - shift - (1 - s.smoothing)) * s.share;
    for_each_vector(s.vocab, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      store((load(room + c, live) * scale - shift) * s.share, l + c, live);
    });
    from_float(drop, l[label]);
  }
  // 0 times the mean would be NaN where a logit is -inf
  const double spread = s.smoothing > 0 ? s.smoothing * (sums.along / s.vocab) : 0;
  return std::log(sums.powers) - (1 - s.smoothing) * hit - spread;
}

GRASSLAND_INLINE float* room_of(float* l, std::vector<float>&) { return l; }
GRASSLAND_INLINE float* room_of(bf16*, std::vector<float>& room) { return room.data(); }

// Rows `begin` to `end` of the batch, whose logits start at row `base`.
template <typename T>
GRASSLAND_UNIT void softmax_rows(const Softmax& s, int64_t base, int64_t begin, int64_t end, T* logits,
                                 double* losses) {
  std::vector<float> room(std::is_same_v<T, float> ? 0 : s.vocab);
  for (int64_t row = begin; row < end; ++row) {
    T* l = logits + (row - base) * s.vocab;
    if (s.target[row] != s.ignore) {
      losses[row] = softmax_row(s, s.target[row], l, room_of(l, room));
    } else {
      losses[row] = 0;
      if (s.grad) std::memset(l, 0, s.vocab * sizeof(T));
    }
  }
}
