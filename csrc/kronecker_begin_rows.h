// Where a KromHC sublayer begins: norm, projection, coefficients and pre-mix, and the backward of all that.

// Tokens x kGroup columns that are summed up in registers, along kTile channels of a stream: few enough that they are
// still near when the next columns need them, enough that loading and storing the sums does not count. Of 128, 384 and
// 768, the last was the fastest at 768 channels.
constexpr int64_t kHalf = 4;
constexpr int64_t kTile = 768;
// How far ahead of its use a gradient is fetched: with a row a token, the processor does not see where the next vectors are.
constexpr int64_t kAhead = 4 * kLanes;

template <typename T>
GRASSLAND_INLINE void fetch(const Upcoming<T>& next, int64_t row, int64_t offset, int64_t size) {
  for (int64_t t = 0; t < next.tokens; ++t) {
    const char* line = reinterpret_cast<const char*>(next.x + t * row + offset);
    for (int64_t at = 0; at < size * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(line + at, 0, 2);
  }
}

// sums[t][j] += x_t * column j for kHalf tokens and kGroup columns of one tile of stream k. A tile has sums of its own: one
// chain of additions along all streams would lose more than PyTorch's products do.
//
// A function of its own: inlined into the loops over the tiles, its sums do not all stay in registers. Of AVX2's sixteen
// those of one token take ten.
template <typename T>
__attribute__((noinline)) GRASSLAND_UNIT void project(const T* const* x, const float* weight, int64_t columns,
                                                      int64_t size, float* sums) {
  constexpr int64_t kAtOnce = kWide ? kHalf : 1;
  for (int64_t first = 0; first < kHalf; first += kAtOnce) {
    Vec sum[kAtOnce][kGroup] = {};
    for_each_vector(size, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      Vec v[kAtOnce];
      for (int64_t t = 0; t < kAtOnce; ++t) {
        v[t] = load(x[first + t] + c, live);
        hold(v[t]);
      }
      for (int64_t j = 0; j < kGroup; ++j) {
        const Vec column = load_full(weight + c * columns + j * kLanes);
        for (int64_t t = 0; t < kAtOnce; ++t) sum[t][j] += column * v[t];
      }
    });
    for (int64_t t = 0; t < kAtOnce; ++t)
      for (int64_t j = 0; j < kGroup; ++j) {
        float* to = sums + ((first + t) * columns + j) * kLanes;
        store_full(load_full(to) + sum[t][j], to);
      }
  }
}

template <typename T>
GRASSLAND_INLINE void add_squares(const T* const* x, int64_t size, Vec* squares) {
  Vec sum[kHalf] = {};
  for_each_vector(size, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    for (int64_t t = 0; t < kHalf; ++t) {
      const Vec v = load(x[t] + c, live);
      sum[t] += v * v;
    }
  });
  for (int64_t t = 0; t < kHalf; ++t) squares[t] += sum[t];
}

// Columns of the coefficients: sigmoid, twice sigmoid for the n of h_post.
GRASSLAND_INLINE float top(int64_t column, int64_t n) { return column >= n && column < 2 * n ? 2.0f : 1.0f; }

template <typename T>
GRASSLAND_UNIT void begin(const T* x, const float* weight, const float* bias, const Beginning<T>& b, const Shape& s,
                          int64_t count, float* sums, const Upcoming<T>& next) {
  const int64_t columns = s.padded_columns;
  Vec squares[kTokens] = {};
  std::memset(sums, 0, kTokens * columns * kLanes * sizeof(float));
  for (int64_t k = 0; k < s.streams; ++k)
    for (int64_t c = 0; c < s.dim; c += kTile) {
      const int64_t size = std::min(kTile, s.dim - c), offset = k * s.dim + c;
      for (int64_t first = 0; first < count; first += kHalf) {
        const T* row[kHalf];
        for (int64_t t = 0; t < kHalf; ++t) row[t] = x + std::min(first + t, count - 1) * s.row() + offset;
        for (int64_t j = 0; j < columns; j += kGroup)
          project(row, weight + s.packed(k, c) + j * kLanes, columns, size, sums + (first * columns + j) * kLanes);
        add_squares(row, size, squares + first);
      }
      fetch(next, s.row(), offset, size);
    }
  for (int64_t t = 0; t < count; ++t) {
    const Beginning<T> own = b.at(t, s);
    const float r = 1.0f / std::max(std::sqrt(total(squares[t])), s.eps);
    for (int64_t j = 0; j < s.columns; ++j) {
      own.saved[j] = r * total(load_full(sums + (t * columns + j) * kLanes));
      own.h[j] = top(j, s.streams) * sigmoid(own.saved[j] + bias[j]);
    }
    own.saved[s.columns] = r;
    for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t k = 0; k < s.streams; ++k) sum += own.h[k] * load(x + t * s.row() + k * s.dim + c, live);
      store(sum, own.u + c, live);
    });
  }
}

// <du, x_k> of one token, two streams at a time. Sums of kPiece channels are added up in double precision: a long chain of
// float32 additions would lose more than PyTorch's products do.
template <typename T>
GRASSLAND_INLINE void along_streams(const T* x, const T* du, const Shape& s, float* out) {
  constexpr int64_t kPiece = 16 * kLanes;
  for (int64_t k = 0; k < s.streams; k += 2) {
    double even = 0, odd = 0;
    for (int64_t first = 0; first < s.dim; first += kPiece) {
      const T *g = du + first, *a = x + k * s.dim + first, *b = a + s.dim;
      Vec sums[2][2] = {};
      int64_t place = 0;
      for_each_vector(std::min(kPiece, s.dim - first), [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
        const Vec v = load(g + c, live);
        sums[0][place] += v * load(a + c, live);
        sums[1][place] += v * load(b + c, live);
        place = 1 - place;
      });
      even += total(sums[0][0] + sums[0][1]);
      odd += total(sums[1][0] + sums[1][1]);
    }
    out[k] = static_cast<float>(even);
    out[k + 1] = static_cast<float>(odd);
  }
}

template <typename T>
GRASSLAND_UNIT void logits_backward(const T* x, const BeginningGradient<T>& all, const Shape& s, int64_t count,
                                    LogitGradients& l, float* dbias) {
  std::fill(l.scaled.begin(), l.scaled.end(), 0.0f);
  std::fill(l.shrink, l.shrink + kTokens, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const BeginningGradient<T> own = all.at(t, s);
    float direct[kMostStreams];
    along_streams(x + t * s.row(), own.du, s, direct);
    const float r = own.saved[s.columns];
    float inner = 0;
    for (int64_t j = 0; j < s.columns; ++j) {
      const float dh = own.dh[j] + (j < s.streams ? direct[j] : 0.0f);
      const float g = dh * own.h[j] * (1.0f - own.h[j] / top(j, s.streams));
      dbias[j] += g;
      inner += g * own.saved[j];
      l.scaled[j * kTokens + t] = r * g;
    }
    l.shrink[t] = r < 1.0f / s.eps ? -r * r * inner : 0.0f;
  }
}

template <typename T, typename O>
GRASSLAND_UNIT void streams_backward(const T* x, const BeginningGradient<T>& g, const Shape& s, int64_t count,
                                     const LogitGradients& l, const float* weight, float* dweight, O* out,
                                     const Upcoming<T>& next) {
  const T* row[kTokens];
  for (int64_t t = 0; t < kTokens; ++t) row[t] = x + std::min(t, count - 1) * s.row();
  const float* scaled = l.scaled.data();
  for (int64_t k = 0; k < s.streams; ++k)
    for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      const float* w = weight + s.packed(k, c);
      float* dw = dweight + s.packed(k, c);
      Vec v[kTokens], d[kTokens];
      for (int64_t t = 0; t < kTokens; ++t) {
        v[t] = load(row[t] + k * s.dim + c, live);
        d[t] = l.shrink[t] * v[t];
      }
      fetch(next, s.row(), k * s.dim + c, kLanes);
      for (int64_t j = 0; j < s.columns; ++j) {
        const Vec column = load_full(w + j * kLanes);
        Vec sum = load_full(dw + j * kLanes);
        for (int64_t t = 0; t < kTokens; ++t) {
          const float factor = scaled[j * kTokens + t];
          d[t] += factor * column;
          sum += factor * v[t];
        }
        store_full(sum, dw + j * kLanes);
      }
      // A bound that is not a constant would keep d out of the registers.
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTokens; ++t) {
        if (t >= count) continue;
        d[t] += g.h[t * s.columns + k] * load(g.du + t * s.dim + c, live);
        if (g.dx != nullptr) {
          const T* flows = g.dx + t * s.row() + k * s.dim + c;
          __builtin_prefetch(flows + kAhead, 0, 3);
          d[t] += load(flows, live);
        }
        store(d[t], out + t * s.row() + k * s.dim + c, live);
      }
    });
}

// out += x
GRASSLAND_UNIT void add(const float* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] += x[i];
}
