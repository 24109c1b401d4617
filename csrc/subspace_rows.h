// The rows of subspace.cpp, for each vector unit.
#include "losses_rows.h"

GRASSLAND_INLINE double dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// n numbers as float32: themselves, or widened into `room`.
GRASSLAND_INLINE float* widened(float* x, int64_t, float*) { return x; }

GRASSLAND_INLINE float* widened(bf16* x, int64_t n, float* room) {
  for (int64_t i = 0; i < n; ++i) room[i] = to_float(x[i]);
  return room;
}

GRASSLAND_INLINE void put_back(const float*, int64_t, float*) {}

GRASSLAND_INLINE void put_back(const float* room, int64_t n, bf16* x) {
  for (int64_t i = 0; i < n; ++i) from_float(room[i], x[i]);
}

// x^ = x / max(|x|, eps), as it is and as the products take it
template <typename T>
GRASSLAND_UNIT void normalise(const Head& h, int64_t begin, int64_t end, T* x, float* hat, T* rounded, float* norms) {
  std::vector<float> room(h.n);
  for (int64_t row = begin; row < end; ++row) {
    const float* in = widened(x + row * h.n, h.n, room.data());
    float* out = hat + row * h.n;
    norms[row] = static_cast<float>(std::sqrt(dot(in, in, h.n)));
    const float norm = std::max(norms[row], kEps);
    for (int64_t i = 0; i < h.n; ++i) out[i] = in[i] / norm;
    put_back(out, h.n, rounded + row * h.n);
  }
}

// d <- (d - x^ <x^, d>) / |x|; a norm that is clamped is a constant
GRASSLAND_UNIT void normalise_backward(const Head& h, int64_t begin, int64_t end, const float* hat, const float* norms,
                                       float* d) {
  for (int64_t row = begin; row < end; ++row) {
    const float* unit = hat + row * h.n;
    float* out = d + row * h.n;
    const float along = norms[row] > kEps ? static_cast<float>(dot(unit, out, h.n)) : 0.0f;
    const float norm = std::max(norms[row], kEps);
    for (int64_t i = 0; i < h.n; ++i) out[i] = (out[i] - along * unit[i]) / norm;
  }
}

template <int K>
GRASSLAND_INLINE void group_norms_of(const float* z, int64_t classes, float* norms) {
  for (int64_t c = 0; c < classes; ++c) {
    float sum = 0;
    for (int j = 0; j < K; ++j) sum += z[c * K + j] * z[c * K + j];
    norms[c] = sum;
  }
}

// |z_i| of one row
GRASSLAND_INLINE void group_norms(const float* z, int64_t classes, int64_t k, float* norms) {
  switch (k) {
    case 1: group_norms_of<1>(z, classes, norms); break;
    case 2: group_norms_of<2>(z, classes, norms); break;
    case 4: group_norms_of<4>(z, classes, norms); break;
    case 8: group_norms_of<8>(z, classes, norms); break;
    default:
      for (int64_t c = 0; c < classes; ++c) norms[c] = dot(z + c * k, z + c * k, k);
  }
  for (int64_t c = 0; c < classes; ++c) norms[c] = std::sqrt(norms[c]);
}

template <int K>
GRASSLAND_INLINE void scale_groups_of(float* z, int64_t classes, const float* factors) {
  for (int64_t c = 0; c < classes; ++c)
    for (int j = 0; j < K; ++j) z[c * K + j] *= factors[c];
}

// z_i <- dl_i scale z_i / |z_i|, 0 where z_i = 0; dl is used up
GRASSLAND_INLINE void pull_back(const Head& h, float scale, float* z, const float* norms, float* dl) {
  for (int64_t c = 0; c < h.classes; ++c) dl[c] = norms[c] > 0 ? scale * dl[c] / norms[c] : 0.0f;
  switch (h.k) {
    case 1: scale_groups_of<1>(z, h.classes, dl); break;
    case 2: scale_groups_of<2>(z, h.classes, dl); break;
    case 4: scale_groups_of<4>(z, h.classes, dl); break;
    case 8: scale_groups_of<8>(z, h.classes, dl); break;
    default:
      for (int64_t c = 0; c < h.classes; ++c)
        for (int64_t j = 0; j < h.k; ++j) z[c * h.k + j] *= dl[c];
  }
}

template <typename T>
GRASSLAND_UNIT void logits_rows(const Head& h, int64_t begin, int64_t end, T* z, float* out) {
  const int64_t width = h.classes * h.k;
  std::vector<float> room(width);
  for (int64_t row = begin; row < end; ++row) {
    float* o = out + row * h.classes;
    group_norms(widened(z + row * width, width, room.data()), h.classes, h.k, o);
    for (int64_t c = 0; c < h.classes; ++c) o[c] *= h.scale;
  }
}

template <typename T>
GRASSLAND_UNIT void logits_backward_rows(const Head& h, int64_t begin, int64_t end, const float* grad, T* z) {
  const int64_t width = h.classes * h.k;
  std::vector<float> norms(h.classes), dl(h.classes), room(width);
  for (int64_t row = begin; row < end; ++row) {
    float* zr = widened(z + row * width, width, room.data());
    group_norms(zr, h.classes, h.k, norms.data());
    std::memcpy(dl.data(), grad + row * h.classes, h.classes * sizeof(float));
    pull_back(h, h.scale, zr, norms.data(), dl.data());
    put_back(zr, width, z + row * width);
  }
}

// The loss of one row with logits scale |z|; dl <- mass softmax - q, the target q smoothed. dl null: the loss alone.
GRASSLAND_INLINE double loss_row(const Head& h, const Target& t, int64_t row, const float* norms, float* p, bool grad) {
  const int64_t classes = h.classes;
  const float uniform = t.smoothing / static_cast<float>(classes);
  const float peak = largest(norms, classes);
  const auto below = [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    return h.scale * (load(norms + c, live) - peak);
  };
  const float* q = t.probabilities == nullptr ? nullptr : t.probabilities + row * classes;
  float* powers = grad ? p : nullptr;
  const Sums sums =
      q == nullptr ? exponentials<false>(classes, powers, q, below) : exponentials<true>(classes, powers, q, below);
  const double mass = q == nullptr ? 1 : sums.mass * (1 - t.smoothing) + t.smoothing;
  const double hit = q == nullptr ? h.scale * (norms[t.labels[row]] - peak) : sums.hit;
  if (grad) {
    const float factor = static_cast<float>(mass / sums.powers);
    if (q != nullptr) {
      for (int64_t c = 0; c < classes; ++c) p[c] = p[c] * factor - (1 - t.smoothing) * q[c] - uniform;
    } else {
      // p - 1 of a confident target, as minus the sum of the others, would lose nothing; 1e-8 of it is lost here
      for (int64_t c = 0; c < classes; ++c) p[c] = p[c] * factor - uniform;
      p[t.labels[row]] -= 1 - t.smoothing;
    }
  }
  return mass * std::log(sums.powers) - (1 - static_cast<double>(t.smoothing)) * hit -
         static_cast<double>(uniform) * sums.along;
}

template <typename T>
GRASSLAND_UNIT void loss_rows(const Head& h, const Target& t, int64_t base, int64_t begin, int64_t end, bool grad, T* z,
                              double* losses) {
  const int64_t width = h.classes * h.k;
  std::vector<float> norms(h.classes), p(h.classes), room(width);
  for (int64_t row = begin; row < end; ++row) {
    T* stored = z + (row - base) * width;
    if (t.labels != nullptr && t.labels[row] == t.ignore) {
      losses[row] = 0;
      if (grad) std::memset(stored, 0, width * sizeof(T));
      continue;
    }
    float* zr = widened(stored, width, room.data());
    group_norms(zr, h.classes, h.k, norms.data());
    losses[row] = loss_row(h, t, row, norms.data(), p.data(), grad);
    if (!grad) continue;
    pull_back(h, h.scale * t.share, zr, norms.data(), p.data());
    put_back(zr, width, stored);
  }
}
