// The mixing H_res of KromHC and its backward: a butterfly on registers, stage by stage e = q (x_0 - x_1), x_0 -= e,
// x_1 += e. The n x n matrix never exists.

// The number of streams, N or, with N = 0, one known at run time; kSize is what there must be room for.
template <int N>
struct Streams {
  static constexpr int kSize = N ? N : kMostStreams;
  static constexpr int kStages = stages(kSize);
  static constexpr int count(const Shape& s) { return N ? N : static_cast<int>(s.streams); }
};

// One stage on the pairs `half` apart; `differences` gets x_0 - x_1 of each pair.
GRASSLAND_INLINE void stage(Vec* x, float q, int n, int half, Vec* differences) {
  int pair = 0;
  for (int k = 0; k < n; ++k)
    if (!(k & half)) {
      const Vec difference = x[k] - x[k + half], e = q * difference;
      differences[pair++] = difference;
      x[k] -= e;
      x[k + half] += e;
    }
}

template <int N, typename T>
GRASSLAND_INLINE void mix_token(const Ending<T>& a, const Shape& s, T* out) {
  const int n = Streams<N>::count(s);
  for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec v[Streams<N>::kSize], differences[Streams<N>::kSize / 2];
    for (int k = 0; k < n; ++k) v[k] = load(a.x + k * s.dim + c, live);
    const float* q = a.h + 2 * n;
    for (int half = n / 2; half >= 1; half /= 2) stage(v, *q++, n, half, differences);
    const Vec branch = load(a.y + c, live);
    for (int k = 0; k < n; ++k) store(v[k] + a.h[n + k] * branch, out + k * s.dim + c, live);
  });
}

// For the gradient g of X': dx = H_res g, dy = h_post g, dh_post = <g, y> and, with x as it enters and g as it leaves
// stage k, dq_k = -sum (g_0 - g_1)(x_0 - x_1).
template <int N, typename T, typename G>
GRASSLAND_INLINE void mix_backward_token(const Ending<T>& a, const EndingGradient<T>& d, const Shape& s, const G* grad) {
  using S = Streams<N>;
  const int n = S::count(s);
  const float* q = a.h + 2 * n;
  Vec along_y[S::kSize] = {}, along_x[S::kStages] = {};
  for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec v[S::kSize], g[S::kSize], entering[S::kStages][S::kSize / 2], leaving[S::kSize / 2], dy = {};
    const Vec branch = load(a.y + c, live);
    for (int k = 0; k < n; ++k) {
      v[k] = load(a.x + k * s.dim + c, live);
      g[k] = load(grad + k * s.dim + c, live);
      dy += a.h[n + k] * g[k];
      along_y[k] += g[k] * branch;
    }
    store(dy, d.dy + c, live);
    int number = 0;
    for (int half = n / 2; half >= 1; half /= 2, ++number) stage(v, q[number], n, half, entering[number]);
    for (int half = 1; half <= n / 2; half *= 2) {
      --number;
      stage(g, q[number], n, half, leaving);
      for (int pair = 0; pair < n / 2; ++pair) along_x[number] -= leaving[pair] * entering[number][pair];
    }
    for (int k = 0; k < n; ++k) store(g[k], d.dx + k * s.dim + c, live);
  });
  for (int k = 0; k < n; ++k) {
    d.dh[k] = 0;
    d.dh[n + k] = total(along_y[k]);
  }
  for (int k = 0; k < stages(n); ++k) d.dh[2 * n + k] = total(along_x[k]);
}

// f(N) for the number of streams: unrolled up to 8.
template <typename F>
GRASSLAND_INLINE void by_streams(int64_t n, F&& f) {
  switch (n) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

template <typename T>
GRASSLAND_UNIT void mix(const Ending<T>& a, const Shape& s, int64_t count, T* out) {
  by_streams(s.streams, [&](auto n) GRASSLAND_INLINE_LAMBDA {
    for (int64_t t = 0; t < count; ++t) mix_token<n>(a.at(t, s), s, out + t * s.row());
  });
}

template <typename T, typename G>
GRASSLAND_UNIT void mix_backward(const Ending<T>& a, const EndingGradient<T>& d, const Shape& s, int64_t count,
                                 const G* grad) {
  by_streams(s.streams, [&](auto n) GRASSLAND_INLINE_LAMBDA {
    for (int64_t t = 0; t < count; ++t) mix_backward_token<n>(a.at(t, s), d.at(t, s), s, grad + t * s.row());
  });
}
