// The rows of cross_entropy.cpp, for each vector unit.
#include "losses_rows.h"

// The loss of a row's logits.
GRASSLAND_INLINE double loss_of(const Softmax& s, const Partial& row) {
  // 0 times the mean would be NaN where a logit is -inf
  const double spread = s.smoothing > 0 ? s.smoothing * (row.along / s.vocab) : 0;
  return std::log(row.powers) - (1 - s.smoothing) * (row.hit - row.peak) - spread;
}

// The loss of the row l, which becomes its gradient times s.share; NaN for a NaN logit, and the gradient, too. room: l itself,
// or room for as many float32.
template <typename T>
GRASSLAND_INLINE double softmax_row(const Softmax& s, int64_t label, T* l, float* room) {
  const float peak = largest(l, s.vocab), hit = to_float(l[label]);
  const auto below = [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA { return load(l + c, live) - peak; };
  const Sums sums = exponentials<false>(s.vocab, room, nullptr, below);
  const float scale = static_cast<float>(1 / sums.powers);
  const float shift = s.smoothing / static_cast<float>(s.vocab);
  const float drop = (room[label] * scale - shift - (1 - s.smoothing)) * s.share;
  for_each_vector(s.vocab, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    store((load(room + c, live) * scale - shift) * s.share, l + c, live);
  });
  from_float(drop, l[label]);
  return loss_of(s, {s.vocab, peak, sums.powers, sums.along, hit});
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
      std::memset(l, 0, s.vocab * sizeof(T));
    }
  }
}

// The logits l of `width` columns
template <typename T>
GRASSLAND_INLINE Partial partial_of(const T* l, int64_t width) {
  const float peak = largest(l, width);
  const bool some = peak > -std::numeric_limits<float>::infinity();  // else they are -inf or NaN
  const float least = some ? peak : 0;
  const auto below = [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA { return load(l + c, live) - least; };
  const Sums sums = exponentials<false>(width, nullptr, nullptr, below);
  return {width, peak, some || std::isnan(sums.along) ? sums.powers : 0, sums.along, 0};
}

// Columns `first` on of rows `base` to `stop`: logits (rows, width).
template <typename T>
GRASSLAND_UNIT void extend_rows(const Softmax& s, int64_t base, int64_t stop, int64_t first, int64_t width,
                                const T* logits, Partial* rows) {
  for (int64_t row = base; row < stop; ++row, logits += width) {
    if (s.target[row] == s.ignore) continue;
    rows[row].extend(partial_of(logits, width));
    const int64_t label = s.target[row] - first;
    if (label >= 0 && label < width) rows[row].hit = to_float(logits[label]);
  }
}

GRASSLAND_UNIT void put_losses(const Softmax& s, const std::vector<Partial>& rows, std::vector<double>& losses) {
  for (size_t row = 0; row < losses.size(); ++row)
    losses[row] = s.target[row] == s.ignore ? 0 : loss_of(s, rows[row]);
}
