// The tiles of skinny.cpp, for each vector unit.

// x in panels: (panel, k, lane), zero in lanes without a row.
template <typename T>
GRASSLAND_UNIT void pack(const Product<T>& p, float* panels) {
  for (int64_t first = 0; first < p.n; first += kLanes) {
    const int64_t live = std::min(kLanes, p.n - first);
    float* panel = panels + first * p.k;
    for_each_vector(p.k, [&](int64_t k, auto width) GRASSLAND_INLINE_LAMBDA {
      Vec m[kLanes] = {};
      for (int64_t i = 0; i < live; ++i) m[i] = load(p.x + (first + i) * p.ldx + k, width);
      transpose(m);
      for (int64_t i = 0; i < width; ++i) store_full(m[i], panel + (k + i) * kLanes);
    });
  }
}

// Asks for what the next block, from `next` on, has where a tile of this one reads term k.
template <int R, int term, typename T>
GRASSLAND_INLINE void prefetch(const T* next, int64_t ldw, int64_t k) {
  if (next == nullptr) return;
  if (term == 1) {
    const int64_t row = k / kLanes;
    const T* line = next + row * ldw + k % kLanes * kLanes;
    if (row < R) __builtin_prefetch(line, 0, 2);
    if (row + kDepth / kLanes < R) __builtin_prefetch(line + kDepth / kLanes * ldw, 0, 2);
  } else {
    __builtin_prefetch(next + k * ldw, 0, 2);
    if (R > kLanes) __builtin_prefetch(next + k * ldw + kLanes, 0, 2);
  }
}

// Where a tile's sums lie.
struct Sums {
  float* at;
  int64_t row, panel;
};

// Of V panels, c (R, lanes) = or += sum over k of a, whose rows and terms lie `row` and `term` apart, and b (k, lanes).
// Blocks are summed apart before they are added up, which keeps the rounding error of a long sum small.
template <int R, int V, int row, int term, typename T>
GRASSLAND_INLINE void tile(const float* a, const float* b, int64_t panel, int64_t depth, const Sums& c, bool add,
                           const T* next, int64_t ldw) {
  Vec sum[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    prefetch<R, term>(next, ldw, k);
    Vec x[V];
    for (int v = 0; v < V; ++v) x[v] = load_full(b + v * panel + k * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * row + k * term] * x[v];
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* at = c.at + r * c.row + v * c.panel;
      store_full(add ? load_full(at) + sum[r][v] : sum[r][v], at);
    }
}

template <int R, int V, bool along, typename T>
GRASSLAND_INLINE void tiles(const float* a, const float* b, int64_t panel, int64_t rows, int64_t depth, float* c,
                            bool add, const T* next, int64_t ldw) {
  constexpr int row = along ? kLong : 1, term = along ? 1 : kWideRows;
  for (int64_t r = 0; r < rows; r += R)
    tile<R, V, row, term>(a + r * row, b, panel, depth, {c + r * kLanes, kLanes, rows * kLanes}, add,
                          next == nullptr ? next : next + r * (along ? ldw : 1), ldw);
}

template <bool along, typename T>
GRASSLAND_INLINE void copy(const T* w, int64_t ldw, int64_t rows, int64_t depth, float* a) {
  const int64_t lines = along ? rows : depth, length = along ? depth : rows, pitch = along ? kLong : kWideRows;
  for (int64_t i = 0; i < lines; ++i)
    for_each_vector(length, [&](int64_t c, auto width) GRASSLAND_INLINE_LAMBDA {
      store_full(load(w + i * ldw + c, width), a + i * pitch + c);
    });
}

// Rows `begin` to `end` of w, all of its terms: y (n, begin .. end).
template <bool along, typename T>
GRASSLAND_UNIT void block(const Product<T>& p, const float* panels, int64_t begin, int64_t end, float* a, float* c) {
  constexpr int64_t most = along ? kDepth : kWideDepth;
  const int64_t rows = rounded(end - begin, kStep), count = rounded(p.n, kLanes) / kLanes, panel_size = rows * kLanes;
  for (int64_t k = 0; k < p.k; k += most) {
    const int64_t depth = std::min(most, p.k - k), after = k + depth;
    const T* w = p.w + (along ? begin * p.ldw + k : k * p.ldw + begin);
    copy<along>(w, p.ldw, end - begin, depth, a);
    const T* next = after < p.k ? p.w + (along ? begin * p.ldw + after : after * p.ldw + begin)
                        : end < p.m ? p.w + (along ? end * p.ldw : end)
                                    : nullptr;
    for (int64_t panel = 0; panel < count;) {
      const float* b = panels + (panel * p.k + k) * kLanes;
      const T* asked = panel == 0 ? next : nullptr;
      float* sums = c + panel * panel_size;
      if (kWide && panel + 1 < count) {
        tiles<12, 2, along>(a, b, p.k * kLanes, rows, depth, sums, k > 0, asked, p.ldw);
        panel += 2;
      } else {
        tiles<kWide ? 24 : 6, 1, along>(a, b, 0, rows, depth, sums, k > 0, asked, p.ldw);
        ++panel;
      }
    }
  }
  for (int64_t first = 0; first < p.n; first += kLanes)
    for_each_vector(end - begin, [&](int64_t r, auto width) GRASSLAND_INLINE_LAMBDA {
      Vec m[kLanes] = {};
      for (int64_t i = 0; i < width; ++i) m[i] = load_full(c + first / kLanes * panel_size + (r + i) * kLanes);
      transpose(m);
      const Vec bias = p.bias == nullptr ? Vec{} : load(p.bias + begin + r, width);
      for (int64_t i = 0; i < std::min(kLanes, p.n - first); ++i)
        store(m[i] + bias, p.y + (first + i) * p.m + begin + r, width);
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
      const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[first + r]);
      from_float(found[i * R + r] + bias, p.y[i * p.m + first + r]);
    }
}

template <int N, int R, typename T>
GRASSLAND_INLINE void few_tiles(const Product<T>& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += R) few_tile<N, R>(p, first);
}

template <typename T>
GRASSLAND_UNIT void few_rows(const Product<T>& p, int64_t begin, int64_t end) {
  switch (p.n) {
    case 1: return few_tiles<1, kWide ? 8 : 4>(p, begin, end);
    case 2: return few_tiles<2, kWide ? 8 : 2>(p, begin, end);
    case 3: return few_tiles<3, kWide ? 4 : 1>(p, begin, end);
    default: return few_tiles<4, kWide ? 4 : 1>(p, begin, end);
  }
}

template <typename T>
GRASSLAND_UNIT void pack_columns(const Outer<T>& p, int64_t begin, int64_t end, float* panels) {
  for (int64_t c = begin * kLanes; c < std::min(end * kLanes, p.h); c += kLanes)
    for (int64_t i = 0; i < p.n; ++i)
      store_full(load(p.x + i * p.h + c, std::min(kLanes, p.h - c)), panels + c * p.n + i * kLanes);
}

// Rows `first` to `first` + R of w. Where a tile reaches over an edge, its sums go by way of a copy.
template <int R, int V, typename T>
GRASSLAND_INLINE void outer_rows(const Outer<T>& p, int64_t first) {
  const int64_t rows = std::min<int64_t>(R, p.m - first);
  float a[kSkinny * R] = {};
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t r = 0; r < rows; ++r) a[i * R + r] = to_float(p.g[i * p.m + first + r]);
  for (int64_t c = 0; c < p.h; c += V * kLanes) {
    const float* b = p.panels + c * p.n;
    float* w = p.w + first * p.h + c;
    const int64_t width = std::min(V * kLanes, p.h - c);
    if (rows == R && width == V * kLanes) {
      tile<R, V, 1, R>(a, b, p.n * kLanes, p.n, {w, p.h, kLanes}, p.add, kNothing, 0);
      continue;
    }
    float edge[R * V * kLanes] = {};
    for (int64_t r = 0; p.add && r < rows; ++r) std::memcpy(edge + r * V * kLanes, w + r * p.h, width * sizeof(float));
    tile<R, V, 1, R>(a, b, p.n * kLanes, p.n, {edge, V * kLanes, kLanes}, p.add, kNothing, 0);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(w + r * p.h, edge + r * V * kLanes, width * sizeof(float));
  }
}

// Rows `begin` to `end` of w, multiples of kStep or the last.
template <typename T>
GRASSLAND_UNIT void outer_range(const Outer<T>& p, int64_t begin, int64_t end) {
  constexpr int R = kWide ? 12 : 6;
  for (int64_t first = begin; first < end; first += R) outer_rows<R, kWide ? 2 : 1>(p, first);
}
