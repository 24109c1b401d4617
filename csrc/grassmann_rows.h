// The rows of grassmann.cpp, for each vector unit.

using Doubles = Split<double, 8, GRASSLAND_REGISTER / 2>::type;

template <int64_t K>
GRASSLAND_INLINE void product_of(double* out, const double* a, bool at, const double* b, int64_t size, double alpha,
                                 double beta) {
  const int64_t k = K > 0 ? K : size, whole = k / 8 * 8, across = at ? k : 1;
  for (int64_t i = 0; i < k; ++i) {
    const double* left = at ? a + i : a + i * k;
    double* row = out + i * k;
    for (int64_t j = 0; j < whole; j += 8) {
      Doubles sum = {}, right;
      for (int64_t l = 0; l < k; ++l) {
        take(b + l * k + j, right);
        sum += left[l * across] * right;
      }
      sum *= alpha;
      if (beta != 0) {  // else what is there may be NaN
        take(row + j, right);
        sum += beta * right;
      }
      give(sum, row + j);
    }
    for (int64_t j = whole; j < k; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += left[l * across] * b[l * k + j];
      row[j] = alpha * sum + (beta != 0 ? beta * row[j] : 0);
    }
  }
}

// out = alpha op(a) b + beta out, for matrices k x k
GRASSLAND_UNIT void product(double* out, const double* a, bool at, const double* b, int64_t k, double alpha,
                            double beta) {
  switch (k) {
    case 4: return product_of<4>(out, a, at, b, k, alpha, beta);
    case 8: return product_of<8>(out, a, at, b, k, alpha, beta);
    default: return product_of<0>(out, a, at, b, k, alpha, beta);
  }
}

// out = a^T
GRASSLAND_INLINE void turn(double* out, const double* a, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) out[j * k + i] = a[i * k + j];
}

GRASSLAND_INLINE double trace(const double* m, int64_t k) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += m[i * k + i];
  return sum;
}

// Rows by rows of a Gram matrix whose sums stay in registers.
constexpr int kSide = kWide ? 4 : 2;

// The inner products of R rows with R, by one pass over the columns; R rows from `ahead`, n apart, are asked for meanwhile.
template <int R>
GRASSLAND_INLINE void tile(const float* const* a, const float* const* b, int64_t width, const float* ahead, int64_t n,
                           float* out) {
  Vec sums[kLanes] = {};
  for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec right[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      right[r] = load(b[r] + c, live);
      hold(right[r]);
      __builtin_prefetch(ahead + r * n + c, 0, 2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec left = load(a[r] + c, live);
      hold(left);
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q) sums[R * r + q] += left * right[q];
    }
  });
  if (R == 4) return store_full(totals(sums), out);
  for (int i = 0; i < R * R; ++i) out[i] = total(sums[i]);
}

// out (k, k) += X Y^T over `width` columns of rows x, y that lie n apart; a ragged tile repeats the last row. symmetric:
// x is y. ahead: rows to ask for.
template <int R>
GRASSLAND_INLINE void gram(const float* x, const float* y, int64_t k, int64_t n, int64_t width, const float* ahead,
                           double* out) {
  const bool symmetric = x == y;
  for (int64_t i = 0; i < k; i += R) {
    for (int64_t j = symmetric ? i : 0; j < k; j += R) {
      const float *a[R], *b[R];
      float found[R == 4 ? 16 : R * R];
      for (int64_t r = 0; r < R; ++r) {
        a[r] = x + std::min(i + r, k - 1) * n;
        b[r] = y + std::min(j + r, k - 1) * n;
      }
      tile<R>(a, b, width, i == j ? ahead + i * n : x, n, found);
      for (int64_t r = 0; r < std::min<int64_t>(R, k - i); ++r) {
        for (int64_t c = 0; c < std::min<int64_t>(R, k - j); ++c) {
          out[(i + r) * k + j + c] += found[r * R + c];
          if (symmetric && i != j) out[(j + c) * k + i + r] += found[r * R + c];
        }
      }
    }
  }
}

// R rows of out, the first of them i, = P X + Q Y, or P X + Y if q is null, over `count` vectors of columns; `live` of the
// last are there.
template <int R, int count, typename Live>
GRASSLAND_INLINE void combine_tile(const float* p, const float* q, const float* x, const float* y, int64_t k, int64_t n,
                                   int64_t i, Live live, float* out, int64_t stride) {
  int64_t row[R];
  for (int64_t r = 0; r < R; ++r) row[r] = std::min(i + r, k - 1);
  Vec sums[R][count] = {};
  for (int r = 0; r < R && q == nullptr; ++r)
    for (int v = 0; v < count; ++v) sums[r][v] = load(y + row[r] * n + v * kLanes, live);
  for (int half = 0; half < (q == nullptr ? 1 : 2); ++half) {
    const float *coefficients = half ? q : p, *in = half ? y : x;
    for (int64_t j = 0; j < k; ++j, in += n) {
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        Vec right = load(in + v * kLanes, live);
        hold(right);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][v] += coefficients[row[r] * k + j] * right;
      }
    }
  }
  for (int64_t r = 0; r < std::min<int64_t>(R, k - i); ++r)
    for (int v = 0; v < count; ++v) store(sums[r][v], out + (i + r) * stride + v * kLanes, live);
}

// rows of out = P X + Q Y, or P X + Y, over columns [begin, begin + width), at most kColumns, of the rows x, y (k, n); rows
// of out are `stride` apart
template <int R>
GRASSLAND_INLINE void combine(const float* p, const float* q, const float* x, const float* y, int64_t k, int64_t n,
                              int64_t begin, int64_t width, float* out, int64_t stride) {
  x += begin, y += begin;
  for (int64_t i = 0; i < k; i += R) {
    if (width == kColumns) {
      constexpr int count = kWide ? 4 : 4 / R;  // so that R x count sums stay in registers
      for (int64_t c = 0; c < kColumns; c += count * kLanes)
        combine_tile<R, count>(p, q, x + c, y + c, k, n, i, std::integral_constant<int64_t, kLanes>{}, out + c, stride);
    } else {
      for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
        combine_tile<R, 1>(p, q, x + c, y + c, k, n, i, live, out + c, stride);
      });
    }
  }
}

// cross and c of the rows X, and s in the first pass, by as many columns at a time as stay in the first cache.
// make(begin, width) writes these columns of X before.
template <int R, bool first, typename F>
GRASSLAND_INLINE void grams(const Step& s, int64_t index, bool last, const float* x, Scratch& w, const F& make) {
  const int64_t k = s.k, n = s.n, piece = std::max(kColumns, kCached / k / kColumns * kColumns);
  const float *weight = s.weight + index * k * n, *grad = s.grad + index * k * n;
  for (Matrix* sums : {&w.s, &w.cross, &w.c})
    if (first || sums != &w.s) std::fill(sums->begin(), sums->end(), 0.0);
  for (int64_t begin = 0; begin < n; begin += piece) {
    const int64_t width = std::min(piece, n - begin);
    make(begin, width);
    // what comes next: more of these rows, or the next class's
    const int64_t next = begin + width < n ? begin + width : last ? 0 : k * n;
    if (first) gram<R>(weight + begin, weight + begin, k, n, width, weight + next, w.s.data());
    gram<R>(weight + begin, x + begin, k, n, width, first ? grad + next : weight, w.cross.data());
    gram<R>(x + begin, x + begin, k, n, width, first ? x + next : weight, w.c.data());
  }
}

// How many powers of a matrix of this trace the series need: the terms of cos, t^j / (2j)!, bound those of sinc.
GRASSLAND_INLINE int powers(double t) {
  int count = 1;
  for (double term = t * t / 24; term > kTerm && count < kSeries; ++count) term *= t / ((2 * count + 3) * (2 * count + 4));
  return count;
}

// u = cos(sqrt h) - 1 and sinc(sqrt h); h is used up. Doubling: sinc <- sinc (1 + u), u <- 2 u u + 4 u.
GRASSLAND_INLINE void trigonometry(Scratch& w) {
  const int64_t k = w.k, size = k * k;
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
    product(w.spare.data(), w.h.data(), false, w.u.data(), k, 1, 0);
    w.u.swap(w.spare);
    product(w.spare.data(), w.h.data(), false, w.sinc.data(), k, 1, 0);
    w.sinc.swap(w.spare);
  }
  for (int64_t i = 0; i < k; ++i) w.sinc[i * k + i] += 1;
  for (int step = 0; step < halvings; ++step) {
    w.spare = w.sinc;
    product(w.spare.data(), w.sinc.data(), false, w.u.data(), k, 1, 1);
    w.sinc.swap(w.spare);
    w.spare = w.u;
    product(w.spare.data(), w.u.data(), false, w.u.data(), k, 2, 4);
    w.u.swap(w.spare);
  }
}

// S+ = P S + Q X with P = 1 + u - a sinc A^T, Q = a sinc, and one Newton-Schulz step on [P Q] in Gram space.
GRASSLAND_INLINE void end_coefficients(Scratch& w, double a) {
  const int64_t k = w.k, size = k * k;
  for (int64_t i = 0; i < size; ++i) {
    w.q[i] = a * w.sinc[i];
    w.p[i] = w.u[i];
  }
  for (int64_t i = 0; i < k; ++i) w.p[i * k + i] += 1;
  turn(w.turned.data(), w.a.data(), k);
  product(w.p.data(), w.q.data(), false, w.turned.data(), k, -1, 1);
  turn(w.turned.data(), w.p.data(), k);
  turn(w.turned_q.data(), w.q.data(), k);
  // N - 1 = P (s P^T + cross Q^T) + Q (cross^T P^T + c Q^T) - 1
  std::fill(w.excess.begin(), w.excess.end(), 0.0);
  for (int64_t i = 0; i < k; ++i) w.excess[i * k + i] = -1;
  product(w.spare.data(), w.s.data(), false, w.turned.data(), k, 1, 0);
  product(w.spare.data(), w.cross.data(), false, w.turned_q.data(), k, 1, 1);
  product(w.excess.data(), w.p.data(), false, w.spare.data(), k, 1, 1);
  product(w.spare.data(), w.cross.data(), true, w.turned.data(), k, 1, 0);
  product(w.spare.data(), w.c.data(), false, w.turned_q.data(), k, 1, 1);
  product(w.excess.data(), w.q.data(), false, w.spare.data(), k, 1, 1);
  w.spare = w.p;
  product(w.spare.data(), w.excess.data(), false, w.p.data(), k, -0.5, 1);
  for (int64_t i = 0; i < size; ++i) w.top_x[i] = static_cast<float>(w.spare[i]);
  w.spare = w.q;
  product(w.spare.data(), w.excess.data(), false, w.q.data(), k, -0.5, 1);
  for (int64_t i = 0; i < size; ++i) w.top_y[i] = static_cast<float>(w.spare[i]);
}

// The stored momentum R S + T X: G = X - A^T S, or transported, (1 + u) G - a sinc (G^T G) S.
GRASSLAND_INLINE void momentum_coefficients(Scratch& w, double a, int64_t mode) {
  const int64_t k = w.k, size = k * k;
  std::fill(w.q.begin(), w.q.end(), 0.0);
  if (mode == kTransport) w.q = w.u;
  for (int64_t i = 0; i < k; ++i) w.q[i * k + i] += 1;
  turn(w.turned.data(), w.a.data(), k);
  product(w.p.data(), w.q.data(), false, w.turned.data(), k, -1, 0);
  if (mode == kTransport) product(w.p.data(), w.sinc.data(), false, w.squared.data(), k, -a, 1);
  for (int64_t i = 0; i < size; ++i) {
    w.bottom_x[i] = static_cast<float>(w.p[i]);
    w.bottom_y[i] = static_cast<float>(w.q[i]);
  }
}

// By tiles of R rows of Gram matrices, and of C rows of what moves.
template <int R, int C>
GRASSLAND_INLINE void step_class(const Step& s, int64_t index, bool last, Scratch& w) {
  const int64_t k = s.k, n = s.n, size = k * k;
  float *weight = s.weight + index * k * n, *buffer = s.buffer + index * k * n;
  const float* grad = s.grad + index * k * n;
  grams<R, true>(s, index, last, buffer, w, [&](int64_t begin, int64_t width) GRASSLAND_INLINE_LAMBDA {
    for (int64_t i = 0; i < k; ++i) {
      float* moved = buffer + i * n + begin;
      const float* added = grad + i * n + begin;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) moved[c] = s.momentum * moved[c] + added[c];
    }
  });
  const double a = -s.lr;
  const bool still = a * a * trace(w.c.data(), k) == 0;
  if (still && s.mode == kOfficial) return;
  const float* x = buffer;
  w.a = w.cross;
  w.h = w.c;
  product(w.h.data(), w.a.data(), true, w.a.data(), k, -1, 1);
  const double horizontal = trace(w.h.data(), k), radial = trace(w.c.data(), k) - horizontal;
  if (radial > kRadial * horizontal || a * a * radial > kTurn) {
    w.horizontal.resize(k * n);
    x = w.horizontal.data();
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j) w.top_x[i * k + j] = static_cast<float>(-w.a[j * k + i]);
    grams<R, false>(s, index, last, x, w, [&](int64_t begin, int64_t width) GRASSLAND_INLINE_LAMBDA {
      for (int64_t c = begin; c < begin + width; c += kColumns)  // G = B - A^T S
        combine<C>(w.top_x.data(), nullptr, weight, buffer, k, n, c, std::min(kColumns, begin + width - c),
                   w.horizontal.data() + c, n);
    });
    std::fill(w.a.begin(), w.a.end(), 0.0);
    w.h = w.c;
  }
  for (int64_t i = 0; i < size; ++i) w.squared[i] = w.h[i], w.h[i] *= a * a;
  trigonometry(w);
  end_coefficients(w, a);
  if (s.mode != kOfficial) momentum_coefficients(w, a, s.mode);
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t width = std::min(kColumns, n - begin);
    combine<C>(w.top_x.data(), w.top_y.data(), weight, x, k, n, begin, width, w.moved.data(), kColumns);
    if (s.mode != kOfficial)
      combine<C>(w.bottom_x.data(), w.bottom_y.data(), weight, x, k, n, begin, width, w.stored.data(), kColumns);
    for (int64_t i = 0; i < k; ++i) {
      if (!still) std::memcpy(weight + i * n + begin, w.moved.data() + i * kColumns, width * sizeof(float));
      if (s.mode != kOfficial)
        std::memcpy(buffer + i * n + begin, w.stored.data() + i * kColumns, width * sizeof(float));
    }
  }
}

template <int R, int C>
GRASSLAND_INLINE void step_classes_of(const Step& s, int64_t begin, int64_t end) {
  Scratch scratch(s.k);
  for (int64_t index = begin; index < end; ++index) step_class<R, C>(s, index, index + 1 == end, scratch);
}

GRASSLAND_UNIT void step_classes(const Step& s, int64_t begin, int64_t end) {
  switch (s.k) {
    case 1: return step_classes_of<1, 1>(s, begin, end);
    case 2: return step_classes_of<2, 2>(s, begin, end);
    default: return step_classes_of<kSide, 4>(s, begin, end);
  }
}
