// The rows of linear.cpp, for each vector unit.

// `live` rows from r on and `width` columns from c on; constants but at the edges.
template <typename R, typename C>
GRASSLAND_INLINE void turn_tile(const Matrix<float>& from, const Matrix<float>& to, int64_t r, int64_t c, R live, C width,
                                bool add) {
  Vec m[kLanes] = {};
  for (int64_t i = 0; i < live; ++i) m[i] = load(from.at + (r + i) * from.row + c, width);
  transpose(m);
  for (int64_t i = 0; i < width; ++i) {
    float* out = to.at + (c + i) * to.row + r;
    store(add ? load(out, live) + m[i] : m[i], out, live);
  }
}

// to (columns, rows) = or += the transpose of columns `begin` to `end` of from (rows, columns).
GRASSLAND_UNIT void turn(const Matrix<float>& from, const Matrix<float>& to, int64_t rows, int64_t begin, int64_t end,
                         bool add) {
  for (int64_t block = begin; block < end; block += kColumns)
    for_each_vector(rows, [&](int64_t r, auto live) GRASSLAND_INLINE_LAMBDA {
      for_each_vector(std::min(kColumns, end - block), [&](int64_t c, auto width) GRASSLAND_INLINE_LAMBDA {
        turn_tile(from, to, r, block + c, live, width, add);
      });
    });
}

template <typename From, typename To>
GRASSLAND_UNIT void put_rows(const Matrix<From>& from, const Matrix<To>& to, int64_t columns, int64_t begin,
                             int64_t end, bool add) {
  for (int64_t r = begin; r < end; ++r) {
    const From* in = from.at + r * from.row;
    To* out = to.at + r * to.row;
    for_each_vector(columns, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      const Vec v = load(in + c, live);
      store(add ? load(out + c, live) + v : v, out + c, live);
    });
  }
}
