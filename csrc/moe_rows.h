// The rows of moe.cpp, for each vector unit.

template <typename Bits>
GRASSLAND_INLINE Bits hashed(Bits x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

GRASSLAND_INLINE uint32_t row_hash(const Dropout& d, int64_t pair) {
  return d.on ? hashed(static_cast<uint32_t>(pair) ^ hashed(d.seed)) : 0u;
}

// The factors of the elements from c on.
template <bool drop>
GRASSLAND_INLINE Vec factors(const Dropout& d, uint32_t row, int64_t c) {
  if (!drop) return Vec{} + 1.0f;
  return keep(Vec{} + d.scale, hashed((lanes() + static_cast<uint32_t>(c)) ^ row) >= d.threshold);
}

// gelu(x) = x sigmoid(1.6 x (1 + 0.045 x^2)): that sigmoid, and what it lacks to one, which a difference would not be as
// exact in.
struct Gate {
  Vec open, shut;
};

GRASSLAND_INLINE Gate gate_of_gelu(const Vec& x) {
  const Vec e = exp_clamped(-1.5957691216f * x * (1.0f + 0.044715f * x * x)), open = 1.0f / (1.0f + e);
  return {open, e * open};
}

GRASSLAND_INLINE Vec gelu(const Vec& x) { return x * gate_of_gelu(x).open; }

// Beyond 10 the gate's clamped exponential is not small enough for x^3.
GRASSLAND_INLINE Vec gelu_slope(const Vec& x, const Gate& g) {
  const Vec most = Vec{} + 10.0f, below = choose(x > most, most, x), v = choose(below < -most, -most, below);
  return g.open + v * g.open * g.shut * 1.5957691216f * (1.0f + 0.134145f * v * v);
}

// use(a, b) with the flags as constants.
template <typename F>
GRASSLAND_INLINE void with_constants(bool a, bool b, const F& use) {
  if (a)
    b ? use(std::true_type{}, std::true_type{}) : use(std::true_type{}, std::false_type{});
  else
    b ? use(std::false_type{}, std::true_type{}) : use(std::false_type{}, std::false_type{});
}

// a = drop(gelu(h)), over h
template <bool drop, typename T>
GRASSLAND_INLINE void up_row(const Dropout& d, uint32_t row, int64_t width, T* h) {
  for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    store(gelu(load(h + c, live)) * factors<drop>(d, row, c), h + c, live);
  });
}

// `kept` gets h itself, if there is one.
template <typename T>
GRASSLAND_UNIT void up_rows(const int64_t* order, const Dropout& d, int64_t width, int64_t begin, int64_t end, T* h,
                            T* kept) {
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t row = row_hash(d, order[r]);
    T* hr = h + r * width;
    if (kept != nullptr) std::memcpy(kept + r * width, hr, width * sizeof(T));
    d.on ? up_row<true>(d, row, width, hr) : up_row<false>(d, row, width, hr);
  }
}

// total += gate drop(act(o))
template <bool act, bool drop, typename T>
GRASSLAND_INLINE void add_row(const T* o, float gate, const Dropout& d, uint32_t row, int64_t dim, float* total) {
  for_each_vector(dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec v = load(o + c, live);
    store(load(total + c, live) + gate * factors<drop>(d, row, c) * (act ? gelu(v) : v), total + c, live);
  });
}

// y_t = sum_k g_tk drop(act(o)) over the kept pairs of a token
template <typename T>
GRASSLAND_UNIT void combine(const T* const* rows, const float* gates, const int64_t* slots, const Dropout& d, bool act,
                            const Shape& s, int64_t begin, int64_t end, T* y) {
  std::vector<float> sum(s.dim);
  with_constants(act, d.on, [&](auto activated, auto dropped) GRASSLAND_INLINE_LAMBDA {
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t pair = t * s.top_k; pair < (t + 1) * s.top_k; ++pair)
        if (slots[pair] >= 0)
          add_row<activated(), dropped()>(rows[slots[pair]], gates == nullptr ? 1.0f : gates[pair], d,
                                          row_hash(d, pair), s.dim, sum.data());
      for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
        store(load(sum.data() + c, live), y + t * s.dim + c, live);
      });
    }
  });
}

// The output row's gradient before the gate, G = dy_t drop act'(o), and what it adds to d gate: <dy drop, act(o)> with an
// activation, <G, b_down> without.
template <bool act, bool drop, typename T>
GRASSLAND_INLINE float output_backward_row(const T* dy, const T* o, const T* bias, const Dropout& d, uint32_t row,
                                           int64_t dim, T* g) {
  Vec sum = {};
  for_each_vector(dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec v = load(dy + c, live) * factors<drop>(d, row, c);
    if (act) {
      const Vec pre = load(o + c, live);
      const Gate gate = gate_of_gelu(pre);
      sum += v * pre * gate.open;
      store(v * gelu_slope(pre, gate), g + c, live);
    } else {
      sum += v * load(bias + c, live);
      store(v, g + c, live);
    }
  });
  return total(sum);
}

template <typename T>
GRASSLAND_UNIT void output_backward(const T* grad, const T* o, const T* bias, const int64_t* order, const Dropout& d,
                                    bool act, const Shape& s, int64_t begin, int64_t end, T* g, float* dgate) {
  with_constants(act, d.on, [&](auto activated, auto dropped) GRASSLAND_INLINE_LAMBDA {
    for (int64_t r = begin; r < end; ++r)
      dgate[order[r]] = output_backward_row<activated(), dropped()>(grad + order[r] / s.top_k * s.dim,
                                                                    activated() ? o + r * s.dim : nullptr, bias, d,
                                                                    row_hash(d, order[r]), s.dim, g + r * s.dim);
  });
}

// From D = G W_down and h: a g (over a), dh = g drop gelu'(h) D (over D), and <D, a> for d gate.
template <bool drop, typename T>
GRASSLAND_INLINE float down_backward_row(const T* h, float gate, const Dropout& d, uint32_t row, int64_t width, T* dh,
                                         T* a) {
  Vec sum = {};
  for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec x = load(h + c, live), v = load(dh + c, live), kept = factors<drop>(d, row, c);
    const Gate half = gate_of_gelu(x);
    const Vec value = x * half.open * kept;
    sum += v * value;
    store(value * gate, a + c, live);
    store(v * gate * kept * gelu_slope(x, half), dh + c, live);
  });
  return total(sum);
}

template <typename T>
GRASSLAND_UNIT void down_backward(const T* h, const float* gates, const int64_t* order, const Dropout& d, bool act,
                                  int64_t width, int64_t begin, int64_t end, T* dh, T* a, float* dgate) {
  for (int64_t r = begin; r < end; ++r) {
    const uint32_t row = row_hash(d, order[r]);
    const float gate = gates[order[r]];
    const int64_t at = r * width;
    const float sum = d.on ? down_backward_row<true>(h + at, gate, d, row, width, dh + at, a + at)
                           : down_backward_row<false>(h + at, gate, d, row, width, dh + at, a + at);
    if (!act) dgate[order[r]] += sum;
  }
}

// Column sums of n rows, weighted by the gates if given, in blocks so that the rounding error stays small.
template <typename T>
GRASSLAND_UNIT void column_sums(const T* x, const float* gates, const int64_t* order, int64_t n, int64_t width,
                                int64_t begin, int64_t end, float* out) {
  std::vector<float> block(end - begin);
  std::fill(out + begin, out + end, 0.0f);
  for (int64_t base = 0; base < n; base += 64) {
    std::fill(block.begin(), block.end(), 0.0f);
    float* b = block.data();
    for (int64_t r = base; r < std::min(base + 64, n); ++r) {
      const float gate = gates == nullptr ? 1.0f : gates[order[r]];
      const T* row = x + r * width + begin;
      for_each_vector(end - begin, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
        store(load(b + c, live) + gate * load(row + c, live), b + c, live);
      });
    }
    for (int64_t c = begin; c < end; ++c) out[c] += block[c - begin];
  }
}
