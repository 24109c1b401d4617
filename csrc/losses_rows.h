// What rows of a loss share, for each vector unit.

// below(c, live): the logits less their peak from column c on. Their exponentials go to `powers`, if there is room.
template <bool weighted, typename F>
GRASSLAND_INLINE Sums exponentials(int64_t n, float* powers, const float* q, const F& below) {
  Sums sums;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec p = {}, a = {}, m = {}, h = {};
    for_each_vector(std::min(kBlock, n - begin), [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      const Vec there = below(begin + c, live), power = exp_below(there), l = leading(there, live, Vec{});
      if (powers != nullptr) store(power, powers + begin + c, live);
      p += leading(power, live, Vec{});
      a += l;
      if (!weighted) return;
      const Vec share = load(q + begin + c, live);
      m += share;
      h += share * l;
    });
    sums.powers += total(p);
    sums.along += total(a);
    if (weighted) sums.mass += total(m), sums.hit += total(h);
  }
  return sums;
}
