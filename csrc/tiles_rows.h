// The tiles of tiles.cpp, for each vector unit.

// Of a gradient a tile has so many rows and panels.
constexpr int kRows = kWide ? 12 : 6, kPanels = kWide ? 2 : 1;

// Sums of rows by panels: where they begin, null for zero, and where they go.
struct Sums {
  const float* from;
  int64_t from_row, from_panel;
  float* to;
  int64_t row, panel;
  Sums at(int64_t r, int64_t v) const {
    return {from == nullptr ? from : from + r * from_row + v * from_panel, from_row, from_panel, to + r * row + v * panel,
            row, panel};
  }
};

// Of V panels, c (R, lanes) += sum over k of a, whose rows and terms lie `row` and `term` apart, and b (k, lanes), whose
// panels do. Blocks are summed apart before they are added up, which keeps the rounding error of a long sum small.
template <int R, int V, typename F>
GRASSLAND_INLINE void tile(const float* a, int64_t row, int64_t term, const float* b, int64_t panel, int64_t depth,
                           const Sums& c, const F& look) {
  Vec sum[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    look(k);
    Vec x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load_full(b + v * panel + k * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * row + k * term] * x[v];
  }
  const Sums held = c;  // which no store reaches
  if (held.from != nullptr) {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += load_full(held.from + r * held.from_row + v * held.from_panel);
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_full(sum[r][v], held.to + r * held.row + v * held.panel);
}

// Registers are allotted well to one tile at a time only.
template <int R, int V>
__attribute__((noinline)) GRASSLAND_UNIT void row_tile(const float* x, int64_t ldx, const float* b, int64_t depth,
                                                       const Sums& c, Ahead& ahead) {
  // The lines that it ends in: in short pieces far apart
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) __builtin_prefetch(c.to + r * c.row + v * c.panel, 1, 3);
  tile<R, V>(x, ldx, 1, b, apart(depth), depth, c, [&](int64_t k) GRASSLAND_INLINE_LAMBDA {
    if (k % kLook == 0) ahead.ask();
  });
}

// c (n, V panels) += x (n, depth) b
template <int V>
GRASSLAND_INLINE void row_tiles(const float* x, int64_t ldx, int64_t n, const float* b, int64_t depth, const Sums& c,
                                Ahead& ahead) {
  const int64_t count = parts(n, kTile);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t first = t * n / count;
    const float* from = x + first * ldx;
    const Sums to = c.at(first, 0);
    switch ((t + 1) * n / count - first) {
      case 1: row_tile<1, V>(from, ldx, b, depth, to, ahead); break;
      case 2: row_tile<2, V>(from, ldx, b, depth, to, ahead); break;
      case 3: row_tile<3, V>(from, ldx, b, depth, to, ahead); break;
      case 4: row_tile<4, V>(from, ldx, b, depth, to, ahead); break;
      case 5: row_tile<5, V>(from, ldx, b, depth, to, ahead); break;
      default: row_tile<6, V>(from, ldx, b, depth, to, ahead);
    }
  }
}

// c (n, count panels) += x (n, depth) b
GRASSLAND_INLINE void all_tiles(const float* x, int64_t ldx, int64_t n, const float* b, int64_t count, int64_t depth,
                                const Sums& c, Ahead& ahead) {
  constexpr int kFour = kWide ? 4 : 1, kTwo = kWide ? 2 : 1;
  for (int64_t v = 0; v < count;) {
    const Sums to = c.at(0, v);
    const float* at = b + v * apart(depth);
    if (v + kFour <= count) {
      row_tiles<kFour>(x, ldx, n, at, depth, to, ahead);
      v += kFour;
    } else if (v + kTwo <= count) {
      row_tiles<kTwo>(x, ldx, n, at, depth, to, ahead);
      v += kTwo;
    } else {
      row_tiles<1>(x, ldx, n, at, depth, to, ahead);
      v += 1;
    }
  }
}

// x in float32: as it lies, or in `room`
GRASSLAND_UNIT const float* in_float(const Product<float>& p, float*) { return p.x; }

GRASSLAND_UNIT const float* in_float(const Product<bf16>& p, float* room) {
  for (int64_t i = 0; i < p.n; ++i)
    for_each_vector(p.k, [&](int64_t k, auto live) GRASSLAND_INLINE_LAMBDA {
      store(load(p.x + i * p.ldx + k, live), room + i * p.k + k, live);
    });
  return room;
}

// w (width, depth) to panels (panel, depth, lane) that lie apart(depth) from each other, zero beyond width
template <typename T>
GRASSLAND_UNIT void turn_block(const T* w, int64_t ldw, int64_t width, int64_t depth, float* panels) {
  for (int64_t v = 0; v < width; v += kLanes, panels += apart(depth)) {
    const int64_t live = std::min(kLanes, width - v);
    for_each_vector(depth, [&](int64_t k, auto terms) GRASSLAND_INLINE_LAMBDA {
      Vec m[kLanes];
      if (live == kLanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) m[i] = load(w + (v + i) * ldw + k, terms);
      } else {
        for (int64_t i = 0; i < kLanes; ++i) m[i] = i < live ? load(w + (v + i) * ldw + k, terms) : Vec{};
      }
      transpose(m);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        if (i < terms) store_full(m[i], panels + (k + i) * kLanes);
    });
  }
}

// w (depth, width) to such panels
template <typename T>
GRASSLAND_UNIT void copy_block(const T* w, int64_t ldw, int64_t width, int64_t depth, float* panels) {
  for (int64_t k = 0; k < depth; ++k)
    for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      store_full(load(w + k * ldw + c, live), panels + c / kLanes * apart(depth) + k * kLanes);
    });
}

// y (n, begin .. end), all terms; room for a block in panels and for the sums (n, end - begin rounded to kLanes). Whole panels
// of float32 go to y as they are, others by way of the sums.
template <bool along, typename T>
GRASSLAND_UNIT void outputs(const Product<T>& p, const float* x, int64_t ldx, int64_t begin, int64_t end, float* panels,
                            float* sums) {
  const int64_t width = end - begin, most = along || width * kTerms <= kBlock ? kTerms : kWideTerms;
  const int64_t ld = rounded(width, kLanes), tiles = parts(p.n, kTile) * parts(width, kColumns);
  T* y = p.y + begin;
  const T* bias = p.bias == nullptr ? nullptr : p.bias + begin;
  constexpr bool floats = std::is_same_v<T, float>;
  const bool direct = floats && width == ld;
  for (int64_t k = 0; k < p.k; k += most) {
    const int64_t depth = std::min(most, p.k - k), after = k + depth;
    const T* w = p.w + (along ? begin * p.ldw + k : k * p.ldw + begin);
    if (along)
      turn_block(w, p.ldw, width, depth, panels);
    else
      copy_block(w, p.ldw, width, depth, panels);
    Sums c{k > 0 ? sums : nullptr, ld, kLanes, sums, ld, kLanes};
    if constexpr (floats) {
      if (direct && k == 0) {
        c.from = p.add ? y : bias;
        c.from_row = p.add ? p.m : 0;
      }
      if (direct && after == p.k) c.to = y, c.row = p.m;
    }
    const bool more = after < p.k;
    Ahead ahead = look_ahead(p, more ? begin : end, more ? after : 0, rounded(width, kColumns), most,
                             tiles * parts(depth, kLook));
    all_tiles(x + k, ldx, p.n, panels, ld / kLanes, depth, c, ahead);
  }
  for (int64_t i = 0; !direct && i < p.n; ++i)
    for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      T* to = y + i * p.m + c;
      const Vec added = bias == nullptr ? Vec{} : load(bias + c, live), held = p.add ? load(to, live) : Vec{};
      store(load_full(sums + i * ld + c) + added + held, to, live);
    });
}

// R rows of w from `first` on, with N rows of x; asks for the next R.
template <int N, int R, typename T>
GRASSLAND_INLINE void few_tile(const Product<T>& p, int64_t first) {
  static_assert(N * R <= kLanes);
  const int64_t rows = std::min<int64_t>(R, p.m - first);
  Vec sum[kWide ? kLanes : N * R] = {};
  for_each_vector(p.k, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec x[N];
    for (int i = 0; i < N; ++i) x[i] = load(p.x + i * p.ldx + c, live);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T* at = p.w + (first + std::min<int64_t>(r, rows - 1)) * p.ldw + c;
      if (sizeof(T) == sizeof(float) || c % (2 * kLanes) == 0) __builtin_prefetch(at + R * p.ldw, 0, 2);
      Vec w = load(at, live);
      if (N > 1) hold(w);
      for (int i = 0; i < N; ++i) sum[i * R + r] += w * x[i];
    }
  });
  float found[kLanes];
  if constexpr (kWide) {
    float sums[kLanes * kLanes];
    for (int k = 0; k < kLanes; ++k) store_full(sum[k], sums + k * kLanes);
    store_full(totals_of(sums), found);
  } else {
    for (int k = 0; k < N * R; ++k) found[k] = total(sum[k]);
  }
  for (int i = 0; i < N; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      T& y = p.y[i * p.m + first + r];
      const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[first + r]), held = p.add ? to_float(y) : 0.0f;
      from_float(found[i * R + r] + bias + held, y);
    }
}

template <int N, int R, typename T>
GRASSLAND_INLINE void few_tiles(const Product<T>& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += R) few_tile<N, R>(p, first);
}

// Up to so many rows of x that is faster than tiles, for which w is laid out.
GRASSLAND_UNIT int64_t most_few() { return kWide ? 32 : 8; }

template <typename T>
GRASSLAND_UNIT void few_rows(const Product<T>& p, int64_t begin, int64_t end) {
  constexpr int kOutputs = kWide ? 4 : 1;
  if (p.n == 1) return few_tiles<1, kWide ? 8 : 4>(p, begin, end);
  if (p.n == 2) return few_tiles<2, kWide ? 8 : 2>(p, begin, end);
  const int64_t count = parts(p.n, 4);
  for (int64_t first = begin; first < end; first += kOutputs)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = t * p.n / count;
      Product<T> part = p;
      part.x += row * p.ldx;
      part.y += row * p.m;
      switch ((t + 1) * p.n / count - row) {
        case 2: few_tile<2, kOutputs>(part, first); break;
        case 3: few_tile<3, kOutputs>(part, first); break;
        default: few_tile<4, kOutputs>(part, first);
      }
    }
}

// Columns of x (depth, width) to panels (panel, depth, lane) that lie `panel` apart.
template <typename T>
GRASSLAND_INLINE void pack_strip(const T* x, int64_t ldx, int64_t depth, int64_t width, int64_t panel, float* panels) {
  for (int64_t i = 0; i < depth; ++i)
    for_each_vector(width, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      store_full(load(x + i * ldx + c, live), panels + c / kLanes * panel + i * kLanes);
    });
}

// Panels `begin` to `end` of x, a few side by side, which lie in one page.
template <typename T>
GRASSLAND_UNIT void pack_columns(const Outer<T>& p, int64_t begin, int64_t end, float* panels) {
  constexpr int64_t kBeside = 16;
  for (int64_t first = begin; first < end; first += kBeside) {
    const int64_t left = first * kLanes, width = std::min(std::min(first + kBeside, end) * kLanes, p.h) - left;
    pack_strip(p.x + left, p.h, p.n, width, p.n * kLanes, panels + left * p.n);
  }
}

// Up to R rows of w by `width` columns, for panels so far apart. Where a tile reaches over an edge, its sums go by way of a
// copy.
template <int R, int V>
__attribute__((noinline)) GRASSLAND_UNIT void outer_tiles(const float* a, const float* b, int64_t panel, int64_t depth,
                                                          float* w, int64_t ldw, int64_t rows, int64_t width, bool add,
                                                          Ahead& ahead) {
  const auto look = [&](int64_t k) GRASSLAND_INLINE_LAMBDA {
    if (k % kLook == 0) ahead.ask();
  };
  for (; width > 0; width -= V * kLanes, b += V * panel, w += V * kLanes) {
    if (rows >= R && width >= V * kLanes) {
      tile<R, V>(a, 1, R, b, panel, depth, {add ? w : nullptr, ldw, kLanes, w, ldw, kLanes}, look);
      continue;
    }
    float edge[R * V * kLanes] = {};
    const int64_t r_end = std::min<int64_t>(R, rows), c_end = std::min(V * kLanes, width);
    for (int64_t r = 0; add && r < r_end; ++r) std::memcpy(edge + r * V * kLanes, w + r * ldw, c_end * sizeof(float));
    tile<R, V>(a, 1, R, b, panel, depth, {edge, V * kLanes, kLanes, edge, V * kLanes, kLanes}, look);
    for (int64_t r = 0; r < r_end; ++r) std::memcpy(w + r * ldw, edge + r * V * kLanes, c_end * sizeof(float));
  }
}

// Rows of g in tiles (tile, term, R), zero beyond the last column.
template <int R, typename T>
GRASSLAND_INLINE void pack_stripe(const T* g, int64_t ldg, int64_t depth, int64_t rows, float* a) {
  for (int64_t first = 0; first < rows; first += R, a += depth * R)
    for (int64_t i = 0; i < depth; ++i) {
      const T* from = g + i * ldg + first;
      if (first + R <= rows) {
#pragma GCC unroll 12
        for (int64_t r = 0; r < R; ++r) a[i * R + r] = to_float(from[r]);
      } else {
        for (int64_t r = 0; r < R; ++r) a[i * R + r] = first + r < rows ? to_float(from[r]) : 0.0f;
      }
    }
}

// Tiles of so many rows of g, in steps of kStep.
template <typename T>
GRASSLAND_UNIT void pack_rows(const Outer<T>& p, int64_t begin, int64_t end, float* tiles) {
  const int64_t first = begin * kStep;
  pack_stripe<kRows>(p.g + first, p.m, p.n, std::min(end * kStep, p.m) - first, tiles + first * p.n);
}

// Rows `begin` to `end` of w, of columns `left` to `right`, a multiple of kPair and one or the last.
template <typename T>
GRASSLAND_UNIT void outer_rows(const Outer<T>& p, int64_t begin, int64_t end, int64_t left, int64_t right) {
  alignas(64) float a[kDeep * kStripe];
  // All panels of few terms stay in the cache, and w is written row by row.
  const bool few_terms = p.n <= kFewRows;
  const int64_t stripe = few_terms ? kRows : kStripe, strip = few_terms ? right - left : kPanels * kLanes;
  for (int64_t first = begin; first < end; first += stripe) {
    const int64_t rows = std::min(stripe, end - first);
    for (int64_t base = 0; base < p.n; base += kDeep) {
      const int64_t depth = std::min(kDeep, p.n - base);
      pack_stripe<kRows>(p.g + base * p.m + first, p.m, depth, rows, a);
      const bool more = base + depth < p.n;
      const int64_t next = more ? first : first + stripe, after = more ? base + depth : 0;
      Ahead ahead = ahead_of(p.g + after * p.m + next, p.m, next < end ? std::min(kDeep, p.n - after) : 0,
                             std::min(stripe, end - next),
                             parts(rows, kRows) * parts(right - left, kPanels * kLanes) * parts(depth, kLook));
      for (int64_t c = left; c < right; c += strip)
        for (int64_t r = 0; r < rows; r += kRows)
          outer_tiles<kRows, kPanels>(a + r * depth, p.laid_out + c * p.n + base * kLanes, p.n * kLanes, depth,
                                      p.w + (first + r) * p.ldw + c, p.ldw, rows - r, std::min(strip, right - c),
                                      p.add || base > 0, ahead);
    }
  }
}

// Columns `left` to `right` of w, a multiple of kPair and one or the last, where g is what is laid out.
template <typename T>
GRASSLAND_UNIT void outer_columns(const Outer<T>& p, int64_t left, int64_t right) {
  const Buffer<float> panels = buffer<float>(kDeep * kStrip);
  for (int64_t c = left; c < right; c += kStrip) {
    const int64_t width = std::min(kStrip, right - c);
    for (int64_t base = 0; base < p.n; base += kDeep) {
      const int64_t depth = std::min(kDeep, p.n - base);
      pack_strip(p.x + base * p.h + c, p.h, depth, width, depth * kLanes, panels.get());
      const bool more = base + depth < p.n;
      const int64_t next = more ? c : c + kStrip, after = more ? base + depth : 0;
      Ahead ahead = ahead_of(p.x + after * p.h + next, p.h, next < right ? std::min(kDeep, p.n - after) : 0,
                             std::min(kStrip, right - next),
                             parts(p.m, kRows) * parts(width, kPanels * kLanes) * parts(depth, kLook));
      for (int64_t r = 0; r < p.m; r += kRows)
        outer_tiles<kRows, kPanels>(p.laid_out + r * p.n + base * kRows, panels.get(), depth * kLanes, depth,
                                    p.w + r * p.ldw + c, p.ldw, p.m - r, width, p.add || base > 0, ahead);
    }
  }
}
