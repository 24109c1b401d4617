// Riemannian SGD with momentum on a product of Grassmannians, without SVD (arXiv 2308.01547; algebra in
// kernels/subspace/eager.py). One class a task: its rows of S^T and of the momentum stay in the cache.
//
//   B <- mu B + D,  A = S^T B,  C = B^T B,  H = a^2 (C - A^T A),  a = -lr
//   S+ = S (cos - a A sinc) + B a sinc,  cos and sinc power series in H
//
// All n-sized work is the Gram matrix of the 2k rows [S; B] and the product of a k x 2k matrix with them. Where B is
// nearly radial, C - A^T A cancels: the horizontal part G = B - S A then takes the place of B.
#include "common.h"

namespace grassland {
namespace {

enum Mode : int64_t { kOfficial = 0, kProject = 1, kTransport = 2 };

constexpr int kSeries = 9;       // powers of H at most
constexpr double kTerm = 1e-15;  // what the powers left out add at most
constexpr double kTrace = 1.0;   // angles are halved until the trace of H is below
constexpr int kHalvings = 40;
// B is replaced by G from this |A|^2 / |G|^2 on, or this a^2 |A|^2: the radial parts of S+ would cancel too.
constexpr double kRadial = 16;
constexpr double kTurn = 0.25;
constexpr int64_t kColumns = 64;

using Matrix = std::vector<double>;  // k x k, by rows

// out = alpha op(a) op(b) + beta out
GRASSLAND_INLINE void product(double* out, const double* a, bool at, const double* b, bool bt, int64_t k, double alpha,
                              double beta) {
  for (int64_t i = 0; i < k; ++i) {
    double* row = out + i * k;
    for (int64_t j = 0; j < k; ++j) row[j] = beta == 0 ? 0 : beta * row[j];
    for (int64_t l = 0; l < k; ++l) {
      const double value = alpha * (at ? a[l * k + i] : a[i * k + l]);
      if (bt) {
        for (int64_t j = 0; j < k; ++j) row[j] += value * b[j * k + l];
      } else {
#pragma omp simd
        for (int64_t j = 0; j < k; ++j) row[j] += value * b[l * k + j];
      }
    }
  }
}

GRASSLAND_INLINE double trace(const double* m, int64_t k) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += m[i * k + i];
  return sum;
}

// The 16 inner products of four rows with four, by one pass over the columns.
GRASSLAND_INLINE void tile(const float* const* a, const float* const* b, int64_t n, float* out) {
  const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  float c00 = 0, c01 = 0, c02 = 0, c03 = 0, c10 = 0, c11 = 0, c12 = 0, c13 = 0;
  float c20 = 0, c21 = 0, c22 = 0, c23 = 0, c30 = 0, c31 = 0, c32 = 0, c33 = 0;
#pragma omp simd reduction(+ : c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33)
  for (int64_t j = 0; j < n; ++j) {
    c00 += a0[j] * b0[j], c01 += a0[j] * b1[j], c02 += a0[j] * b2[j], c03 += a0[j] * b3[j];
    c10 += a1[j] * b0[j], c11 += a1[j] * b1[j], c12 += a1[j] * b2[j], c13 += a1[j] * b3[j];
    c20 += a2[j] * b0[j], c21 += a2[j] * b1[j], c22 += a2[j] * b2[j], c23 += a2[j] * b3[j];
    c30 += a3[j] * b0[j], c31 += a3[j] * b1[j], c32 += a3[j] * b2[j], c33 += a3[j] * b3[j];
  }
  const float found[16] = {c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33};
  std::memcpy(out, found, sizeof(found));
}

// out (k, k) = X Y^T for rows x, y of length n; a ragged tile repeats the last row. symmetric: x is y.
GRASSLAND_INLINE void gram(const float* x, const float* y, int64_t k, int64_t n, double* out) {
  const bool symmetric = x == y;
  for (int64_t i = 0; i < k; i += 4) {
    for (int64_t j = symmetric ? i : 0; j < k; j += 4) {
      const float *a[4], *b[4];
      float found[16];
      for (int64_t r = 0; r < 4; ++r) {
        a[r] = x + std::min(i + r, k - 1) * n;
        b[r] = y + std::min(j + r, k - 1) * n;
      }
      tile(a, b, n, found);
      for (int64_t r = 0; r < std::min<int64_t>(4, k - i); ++r) {
        for (int64_t c = 0; c < std::min<int64_t>(4, k - j); ++c) {
          out[(i + r) * k + j + c] = found[r * 4 + c];
          if (symmetric) out[(j + c) * k + i + r] = found[r * 4 + c];
        }
      }
    }
  }
}

// rows of out (count, width) = P X + Q Y over columns [begin, begin + width) of the rows x, y (k, n)
GRASSLAND_INLINE void combine(const float* p, const float* q, const float* x, const float* y, int64_t k, int64_t n,
                              int64_t begin, int64_t width, float* out) {
  for (int64_t i = 0; i < k; ++i) {
    float* o = out + i * kColumns;
    std::memset(o, 0, kColumns * sizeof(float));
    for (int half = 0; half < 2; ++half) {
      const float* coefficients = (half ? q : p) + i * k;
      const float* rows = (half ? y : x) + begin;
      const int64_t whole = k / 4 * 4;
      for (int64_t j = 0; j < whole; j += 4) {
        const float c0 = coefficients[j], c1 = coefficients[j + 1], c2 = coefficients[j + 2], c3 = coefficients[j + 3];
        const float *r0 = rows + j * n, *r1 = r0 + n, *r2 = r1 + n, *r3 = r2 + n;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) o[c] += (c0 * r0[c] + c1 * r1[c]) + (c2 * r2[c] + c3 * r3[c]);
      }
      for (int64_t j = whole; j < k; ++j) {
        const float c0 = coefficients[j];
        const float* r0 = rows + j * n;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) o[c] += c0 * r0[c];
      }
    }
  }
}

struct Step {
  float *weight, *buffer;
  const float* grad;
  int64_t k, n;
  double lr;
  float momentum;
  int64_t mode;
};

// What one class needs besides its rows: s = S^T S, cross = S^T X, c = X^T X for the rows X that are B, or G itself, and a,
// what projects X to G = X - S a: cross, or 0.
template <int64_t K>
struct Scratch {
  int64_t k;
  Matrix a, c, s, cross, h, u, sinc, p, q, excess, spare;
  std::vector<float> top_x, top_y, bottom_x, bottom_y, moved, stored, horizontal;
  explicit Scratch(int64_t k)
      : k(k), a(k * k), c(k * k), s(k * k), cross(k * k), h(k * k), u(k * k), sinc(k * k), p(k * k), q(k * k), excess(k * k),
        spare(k * k), top_x(k * k), top_y(k * k), bottom_x(k * k), bottom_y(k * k), moved(k * kColumns),
        stored(k * kColumns) {}
  // A constant where K is one, which unrolls the loops over k.
  int64_t size() const { return K > 0 ? K : k; }
};

// How many powers of a matrix of this trace the series need: the terms of cos, t^j / (2j)!, bound those of sinc.
GRASSLAND_INLINE int powers(double t) {
  int count = 1;
  for (double term = t * t / 24; term > kTerm && count < kSeries; ++count) term *= t / ((2 * count + 3) * (2 * count + 4));
  return count;
}

// u = cos(sqrt h) - 1 and sinc(sqrt h); h is used up. Doubling: sinc <- sinc (1 + u), u <- 2 u u + 4 u.
template <int64_t K>
GRASSLAND_INLINE void trigonometry(Scratch<K>& w) {
  const int64_t k = w.size(), size = k * k;
  int halvings = 0;
  double t = trace(w.h.data(), k);
  for (; t > kTrace && halvings < kHalvings; t *= 0.25) ++halvings;
  const double shrink = std::ldexp(1.0, -2 * halvings);
  for (int64_t i = 0; i < size; ++i) w.h[i] *= shrink;
  std::fill(w.u.begin(), w.u.end(), 0.0);
  std::fill(w.sinc.begin(), w.sinc.end(), 0.0);
  double factorial[2 * kSeries + 2] = {1};
  for (int i = 1; i < 2 * kSeries + 2; ++i) factorial[i] = factorial[i - 1] * i;
  for (int j = powers(t); j >= 1; --j) {
    const double sign = j % 2 ? -1.0 : 1.0;
    for (int64_t i = 0; i < k; ++i) {
      w.u[i * k + i] += sign / factorial[2 * j];
      w.sinc[i * k + i] += sign / factorial[2 * j + 1];
    }
    product(w.spare.data(), w.h.data(), false, w.u.data(), false, k, 1, 0);
    w.u.swap(w.spare);
    product(w.spare.data(), w.h.data(), false, w.sinc.data(), false, k, 1, 0);
    w.sinc.swap(w.spare);
  }
  for (int64_t i = 0; i < k; ++i) w.sinc[i * k + i] += 1;
  for (int step = 0; step < halvings; ++step) {
    w.spare = w.sinc;
    product(w.spare.data(), w.sinc.data(), false, w.u.data(), false, k, 1, 1);
    w.sinc.swap(w.spare);
    w.spare = w.u;
    product(w.spare.data(), w.u.data(), false, w.u.data(), false, k, 2, 4);
    w.u.swap(w.spare);
  }
}

// S+ = P S + Q X with P = 1 + u - a sinc A^T, Q = a sinc, and one Newton-Schulz step on [P Q] in Gram space.
template <int64_t K>
GRASSLAND_INLINE void end_coefficients(Scratch<K>& w, double a) {
  const int64_t k = w.size(), size = k * k;
  for (int64_t i = 0; i < size; ++i) {
    w.q[i] = a * w.sinc[i];
    w.p[i] = w.u[i];
  }
  for (int64_t i = 0; i < k; ++i) w.p[i * k + i] += 1;
  product(w.p.data(), w.q.data(), false, w.a.data(), true, k, -1, 1);
  // N - 1 = P (s P^T + cross Q^T) + Q (cross^T P^T + c Q^T) - 1
  std::fill(w.excess.begin(), w.excess.end(), 0.0);
  for (int64_t i = 0; i < k; ++i) w.excess[i * k + i] = -1;
  product(w.spare.data(), w.s.data(), false, w.p.data(), true, k, 1, 0);
  product(w.spare.data(), w.cross.data(), false, w.q.data(), true, k, 1, 1);
  product(w.excess.data(), w.p.data(), false, w.spare.data(), false, k, 1, 1);
  product(w.spare.data(), w.cross.data(), true, w.p.data(), true, k, 1, 0);
  product(w.spare.data(), w.c.data(), false, w.q.data(), true, k, 1, 1);
  product(w.excess.data(), w.q.data(), false, w.spare.data(), false, k, 1, 1);
  w.spare = w.p;
  product(w.spare.data(), w.excess.data(), false, w.p.data(), false, k, -0.5, 1);
  for (int64_t i = 0; i < size; ++i) w.top_x[i] = static_cast<float>(w.spare[i]);
  w.spare = w.q;
  product(w.spare.data(), w.excess.data(), false, w.q.data(), false, k, -0.5, 1);
  for (int64_t i = 0; i < size; ++i) w.top_y[i] = static_cast<float>(w.spare[i]);
}

// The stored momentum R S + T X: G = X - A^T S, or transported, (1 + u) G - a sinc (G^T G) S with G^T G = c.
template <int64_t K>
GRASSLAND_INLINE void momentum_coefficients(Scratch<K>& w, double a, int64_t mode) {
  const int64_t k = w.size(), size = k * k;
  std::fill(w.q.begin(), w.q.end(), 0.0);
  if (mode == kTransport) w.q = w.u;
  for (int64_t i = 0; i < k; ++i) w.q[i * k + i] += 1;
  product(w.p.data(), w.q.data(), false, w.a.data(), true, k, -1, 0);
  if (mode == kTransport) product(w.p.data(), w.sinc.data(), false, w.c.data(), false, k, -a, 1);
  for (int64_t i = 0; i < size; ++i) {
    w.bottom_x[i] = static_cast<float>(w.p[i]);
    w.bottom_y[i] = static_cast<float>(w.q[i]);
  }
}

// horizontal <- G = B - A^T S
template <int64_t K>
GRASSLAND_INLINE void project(const Step& s, const float* weight, const float* buffer, Scratch<K>& w) {
  const int64_t k = w.size(), n = s.n;
  w.horizontal.resize(k * n);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      w.top_x[i * k + j] = static_cast<float>(-w.a[j * k + i]);
      w.top_y[i * k + j] = i == j ? 1.0f : 0.0f;
    }
  }
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t width = std::min(kColumns, n - begin);
    combine(w.top_x.data(), w.top_y.data(), weight, buffer, k, n, begin, width, w.moved.data());
    for (int64_t i = 0; i < k; ++i)
      std::memcpy(w.horizontal.data() + i * n + begin, w.moved.data() + i * kColumns, width * sizeof(float));
  }
}

template <int64_t K>
GRASSLAND_INLINE void step_class(const Step& s, int64_t index, Scratch<K>& w) {
  const int64_t k = w.size(), n = s.n, size = k * k;
  float *weight = s.weight + index * k * n, *buffer = s.buffer + index * k * n;
  const float* grad = s.grad + index * k * n;
  const float mu = s.momentum;
#pragma omp simd
  for (int64_t i = 0; i < k * n; ++i) buffer[i] = mu * buffer[i] + grad[i];
  gram(weight, weight, k, n, w.s.data());
  gram(weight, buffer, k, n, w.a.data());
  gram(buffer, buffer, k, n, w.c.data());
  const double a = -s.lr;
  const bool still = a * a * trace(w.c.data(), k) == 0;
  if (still && s.mode == kOfficial) return;
  const float* x = buffer;
  w.cross = w.a;
  w.h = w.c;
  product(w.h.data(), w.a.data(), true, w.a.data(), false, k, -1, 1);
  const double horizontal = trace(w.h.data(), k), radial = trace(w.c.data(), k) - horizontal;
  if (radial > kRadial * horizontal || a * a * radial > kTurn) {
    project(s, weight, buffer, w);
    x = w.horizontal.data();
    gram(weight, x, k, n, w.cross.data());
    gram(x, x, k, n, w.c.data());
    std::fill(w.a.begin(), w.a.end(), 0.0);
    w.h = w.c;
  }
  const Matrix squared = w.h;  // G^T G
  for (int64_t i = 0; i < size; ++i) w.h[i] *= a * a;
  trigonometry(w);
  end_coefficients(w, a);
  if (s.mode != kOfficial) {
    w.c = squared;
    momentum_coefficients(w, a, s.mode);
  }
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t width = std::min(kColumns, n - begin);
    combine(w.top_x.data(), w.top_y.data(), weight, x, k, n, begin, width, w.moved.data());
    if (s.mode != kOfficial) combine(w.bottom_x.data(), w.bottom_y.data(), weight, x, k, n, begin, width, w.stored.data());
    for (int64_t i = 0; i < k; ++i) {
      if (!still) std::memcpy(weight + i * n + begin, w.moved.data() + i * kColumns, width * sizeof(float));
      if (s.mode != kOfficial)
        std::memcpy(buffer + i * n + begin, w.stored.data() + i * kColumns, width * sizeof(float));
    }
  }
}

template <int64_t K>
GRASSLAND_INLINE void step_classes_of(const Step& s, int64_t begin, int64_t end) {
  Scratch<K> scratch(s.k);
  for (int64_t index = begin; index < end; ++index) step_class(s, index, scratch);
}

GRASSLAND_MULTIARCH void step_classes(const Step& s, int64_t begin, int64_t end) {
  switch (s.k) {
    case 4: return step_classes_of<4>(s, begin, end);
    case 8: return step_classes_of<8>(s, begin, end);
    default: return step_classes_of<0>(s, begin, end);
  }
}

void grassmann_step_cpu(Tensor weight, Tensor buffer, const Tensor& grad, int64_t k, double lr, double momentum,
                        int64_t mode) {
  const Step s{data<float>(weight), data<float>(buffer), data<float>(grad), k, weight.size(1), lr,
               static_cast<float>(momentum), mode};
  torch::stable::parallel_for(0, weight.size(0) / k, 1, [&](int64_t begin, int64_t end) { step_classes(s, begin, end); });
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous float32 by kernels/subspace/op.py.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "grassmann_step_(Tensor(a!) weight, Tensor(b!) buffer, Tensor grad, int k, float lr, float momentum, int mode) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) { m.impl("grassmann_step_", TORCH_BOX(&grassland::grassmann_step_cpu)); }
