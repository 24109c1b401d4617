// The rows of plucker.cpp, for each vector unit.

GRASSLAND_INLINE float square_norm(const float* row, int64_t stride) {
  Vec sum = {};
  for (int64_t c = 0; c < stride; c += kLanes) sum += load_full(row + c) * load_full(row + c);
  return total(sum);
}

// Lane k is the total of the vector that f(z_s, slot) returns for the partner of that slot, 0 where there is none.
template <typename F>
GRASSLAND_INLINE Vec for_partners(const Wedge& w, int64_t token, int64_t slot, float* sums, F&& f) {
  const int64_t t = w.position(token);
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t offset = w.reach[slot + k];
    store_full(offset <= t ? f(w.row(token - offset), slot + k) : Vec{}, sums + k * kLanes);
  }
  return totals_of(sums);
}

// y_t, and how each pair came about: delta = z_s - ratio z_t, rest = |delta|^2, norm = N, and the weight
// scale = 1 / (n max(N, eps)) of delta in y_t; a missing partner has scale 0.
GRASSLAND_INLINE void average(const Wedge& w, int64_t token, Token& p) {
  const float* zt = w.row(token);
  const int64_t t = w.position(token);
  const float square = square_norm(zt, w.stride);
  float count = 0;
  for (const int64_t offset : w.offsets) count += offset <= t;
  for (int64_t slot = 0; slot < w.slots(); slot += kLanes) {
    const Vec inner = for_partners(w, token, slot, p.sums, [&](const float* zs, int64_t) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t c = 0; c < w.stride; c += kLanes) sum += load_full(zt + c) * load_full(zs + c);
      return sum;
    });
    store_full(square > 0 ? inner / square : Vec{}, p.ratio.data() + slot);
    const Vec rest = for_partners(w, token, slot, p.sums, [&](const float* zs, int64_t k) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t c = 0; c < w.stride; c += kLanes) {
        const Vec delta = load_full(zs + c) - p.ratio[k] * load_full(zt + c);
        sum += delta * delta;
      }
      return sum;
    });
    const Vec norm = std::sqrt(square) * square_root(rest), least = Vec{} + w.eps;
    const auto there = load_bits(w.reach.data() + slot) <= static_cast<uint32_t>(t);
    store_full(rest, p.rest.data() + slot);
    store_full(norm, p.norm.data() + slot);
    store_full(keep(1.0f / (choose(norm < least, least, norm) * count), there), p.scale.data() + slot);
  }
  for (int64_t c = 0; c < w.stride; c += kLanes) {
    const Vec z = load_full(zt + c);
    Vec y = {};
    for (size_t k = 0; k < w.offsets.size(); ++k) {
      if (w.offsets[k] <= t) y += p.scale[k] * (load_full(w.row(token - w.offsets[k]) + c) - p.ratio[k] * z);
    }
    store_full(z, p.z.data() + c);
    store_full(y, p.y.data() + c);
  }
}

// Pairs (i, j), i < j, in lexicographic order; each row overwrites what the one before it wrote past its end.
template <typename T>
GRASSLAND_INLINE void wedge(Token& p, int64_t r, int64_t pairs, T* out) {
  float* row = p.triangle();
  for (int64_t i = 0; i + 1 < r; ++i) {
    const float zi = p.z[i], yi = p.y[i];
    for (int64_t j = i + 1; j < r; j += kLanes)
      store_full(zi * load_full(p.y.data() + j) - yi * load_full(p.z.data() + j), row + j - i - 1);
    row += r - 1 - i;
  }
  row = p.triangle();
#pragma omp simd
  for (int64_t k = 0; k < pairs; ++k) from_float(row[k], out[k]);
}

// V vectors of columns of the antisymmetric D, from column `begin` on; its upper triangle is in the coordinates. They give
// dz and dy their columns' part at once. What a row gives stays in along_y and along_z, a vector whose lanes are to be summed.
template <int V>
struct Columns {
  Token& p;
  int64_t r, begin;
  Vec z[V], y[V], dz[V], dy[V];

  // Row i from the vector `first` on, where the diagonal is if `diagonal`.
  template <int first, bool diagonal>
  GRASSLAND_INLINE_LAMBDA void row(int64_t i) {
    const float* grad = p.triangle() + i * r - i * (i + 1) / 2 + begin - i - 1;
    float *sum_y = p.along_y.data() + i * kLanes, *sum_z = p.along_z.data() + i * kLanes;
    const float zi = p.z[i], yi = p.y[i];
    Vec along_y = {}, along_z = {};
    if (!diagonal) {
      along_y = load_full(sum_y);
      along_z = load_full(sum_z);
    }
    for (int v = first; v < V; ++v) {
      Vec g = load_full(grad + v * kLanes);
      if (diagonal && v == first) g = keep(g, lanes() > static_cast<uint32_t>(i - begin - v * kLanes));
      along_y += g * y[v];
      along_z += g * z[v];
      dz[v] -= g * yi;
      dy[v] += g * zi;
    }
    store_full(along_y, sum_y);
    store_full(along_z, sum_z);
  }

  template <int first>
  GRASSLAND_INLINE_LAMBDA void diagonal() {
    const int64_t end = std::min(begin + (first + 1) * kLanes, r - 1);
    for (int64_t i = begin + first * kLanes; i < end; ++i) row<first, true>(i);
    if constexpr (first + 1 < V) diagonal<first + 1>();
  }

  GRASSLAND_INLINE_LAMBDA void run() {
    for (int v = 0; v < V; ++v) {
      z[v] = load_full(p.z.data() + begin + v * kLanes);
      y[v] = load_full(p.y.data() + begin + v * kLanes);
      dz[v] = dy[v] = Vec{};
    }
    for (int64_t i = 0; i < begin; ++i) row<0, false>(i);
    diagonal<0>();
    for (int v = 0; v < V; ++v) {
      store_full(dz[v], p.dz.data() + begin + v * kLanes);
      store_full(dy[v], p.dy.data() + begin + v * kLanes);
    }
  }
};

// dz = D y and dy = -D z for the antisymmetric D whose upper triangle is `grad`.
template <typename T>
GRASSLAND_INLINE void wedge_backward(Token& p, int64_t r, int64_t pairs, const T* grad) {
  float* upper = p.triangle();
#pragma omp simd
  for (int64_t k = 0; k < pairs; ++k) upper[k] = to_float(grad[k]);
  int64_t begin = 0;
  for (; r - begin > 3 * kLanes; begin += 4 * kLanes) Columns<4>{p, r, begin}.run();
  if (r - begin > 2 * kLanes)
    Columns<3>{p, r, begin}.run();
  else if (r - begin > kLanes)
    Columns<2>{p, r, begin}.run();
  else if (r > begin)
    Columns<1>{p, r, begin}.run();
  for (int64_t i = 0; i < r; i += kLanes) {
    store_full(load_full(p.dz.data() + i) + totals_of(p.along_y.data() + i * kLanes), p.dz.data() + i);
    store_full(load_full(p.dy.data() + i) - totals_of(p.along_z.data() + i * kLanes), p.dy.data() + i);
  }
}

// The pairs of token t as targets. With h = dy_t / n, sigma = 1 / max(N, eps), kappa = -sigma^2 <h, delta> / N, which is 0
// where the norm is clamped:
//   dz_t += kappa (|delta|^2 z_t - <t,s> delta) - sigma c h        dz_s += sigma h + kappa |z_t|^2 delta
GRASSLAND_INLINE void targets_backward(const Wedge& w, int64_t token, Token& p, Link* links) {
  const float *zt = w.row(token), *dy = p.dy.data();
  const int64_t t = w.position(token);
  const float square = square_norm(zt, w.stride);
  Vec ahead = {}, back = {};
  for (int64_t slot = 0; slot < w.slots(); slot += kLanes) {
    const Vec along = for_partners(w, token, slot, p.sums, [&](const float* zs, int64_t k) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t c = 0; c < w.stride; c += kLanes)
        sum += load_full(dy + c) * (load_full(zs + c) - p.ratio[k] * load_full(zt + c));
      return sum;
    });
    const Vec scale = load_full(p.scale.data() + slot), norm = load_full(p.norm.data() + slot);
    const Vec kappa = keep(-scale * along / (norm * norm), norm > Vec{} + w.eps);
    ahead += kappa * load_full(p.rest.data() + slot);
    back += scale * load_full(p.ratio.data() + slot);
    store_full(kappa * square, p.slope.data() + slot);
  }
  const float along_z = total(ahead), along_dy = total(back);
  for (int64_t c = 0; c < w.stride; c += kLanes) {
    const Vec z = load_full(zt + c);
    Vec sum = load_full(p.dz.data() + c) + along_z * z - along_dy * load_full(dy + c);
    for (size_t k = 0; k < w.offsets.size(); ++k) {
      if (w.offsets[k] > t) continue;
      const Vec delta = load_full(w.row(token - w.offsets[k]) + c) - p.ratio[k] * z;
      sum -= p.slope[k] * p.ratio[k] * delta;
    }
    store_full(sum, p.dz.data() + c);
  }
  for (size_t k = 0; k < w.offsets.size(); ++k) links[k] = {p.ratio[k], p.scale[k], p.slope[k]};
}

// dz of a token and what flows into it as the source of later ones, gathered in the order of the offsets.
GRASSLAND_INLINE void sources_backward(const Wedge& w, int64_t token, const float* dy, const Link* links, const float* dz,
                                       float* out) {
  const int64_t t = w.position(token), many = static_cast<int64_t>(w.offsets.size());
  for_each_vector(w.shape.rank, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec zs = load_full(w.row(token) + c);
    Vec sum = load_full(dz + c);
    for (int64_t k = 0; k < many; ++k) {
      if (w.offsets[k] >= w.shape.length - t) continue;
      const int64_t target = token + w.offsets[k];
      const Link& link = links[target * many + k];
      const Vec delta = zs - link.ratio * load_full(w.row(target) + c);
      sum += link.scale * load_full(dy + target * w.stride + c) + link.slope * delta;
    }
    store(sum, out + c, live);
  });
}

template <typename T>
GRASSLAND_UNIT void wedge_rows(const Wedge& w, int64_t begin, int64_t end, int64_t base, T* out) {
  const Shape& s = w.shape;
  Token p(w);
  for (int64_t row = begin; row < end; ++row) {
    average(w, s.token(row), p);
    wedge(p, s.rank, s.pairs, out + (row - base) * s.pairs);
  }
}

template <typename T>
GRASSLAND_UNIT void wedge_rows_backward(const Wedge& w, int64_t begin, int64_t end, int64_t base, const T* grad,
                                        T* wedges, const Gradients& out) {
  const Shape& s = w.shape;
  Token p(w);
  for (int64_t token = begin; token < end; ++token) {
    average(w, token, p);
    if (wedges != nullptr) wedge(p, s.rank, s.pairs, wedges + (token - base) * s.pairs);
    if (grad == nullptr) continue;
    wedge_backward(p, s.rank, s.pairs, grad + (token - base) * s.pairs);
    targets_backward(w, token, p, out.links + token * w.offsets.size());
    std::memcpy(out.dz + token * w.stride, p.dz.data(), w.stride * sizeof(float));
    std::memcpy(out.dy + token * w.stride, p.dy.data(), w.stride * sizeof(float));
  }
}

GRASSLAND_UNIT void source_rows_backward(const Wedge& w, int64_t begin, int64_t end, const Gradients& found,
                                         float* out) {
  for (int64_t token = begin; token < end; ++token) {
    const float* dz = found.dz + token * w.stride;
    sources_backward(w, token, found.dy, found.links, dz, out + token * w.shape.rank);
  }
}

// Sums blocks of kGrain tokens before adding them up, which keeps the rounding error of a long sum small.
template <typename T>
GRASSLAND_UNIT void sum_rows(const T* grad, int64_t first_valid, const Shape& s, int64_t begin, int64_t end,
                             float* total) {
  std::vector<float> block(end - begin);
  for (int64_t base = 0; base < s.tokens; base += kGrain) {
    std::fill(block.begin(), block.end(), 0.0f);
    for (int64_t token = base; token < std::min(base + kGrain, s.tokens); ++token) {
      if (token % s.length < first_valid) continue;
      const T* row = grad + token * s.dim + begin;
      for (int64_t c = 0; c < end - begin; ++c) block[c] += to_float(row[c]);
    }
    for (int64_t c = begin; c < end; ++c) total[c] += block[c - begin];
  }
}

