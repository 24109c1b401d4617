// The rows of linear.cpp, for each vector unit.

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
