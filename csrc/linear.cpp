// The choice between tiles.cpp, pairs.cpp, MKL by way of ATen's mm, and oneDNN, whose products go to new memory and take a
// transposed weight as it lies.
#include "linear.h"
#include "vec.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

// oneDNN's product, from the C interface for ahead-of-time compiled models. Its header takes no stable-ABI extension, and
// not every build of torch has it: a weak symbol is null where it is missing.
#if defined(__GNUC__) && !defined(__APPLE__)
#define GRASSLAND_HAS_ONEDNN
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* activation, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* out);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(
    AtenTensorHandle x, AtenTensorHandle other, AtenTensorHandle w, AtenTensorHandle* bias, const char* operation,
    AtenTensorHandle* out);
}
#endif

namespace grassland {
namespace {

// Below so many multiplications, preparing oneDNN's takes longer than they do: 10 us.
constexpr int64_t kWork = 1 << 20;

// Whether oneDNN is to multiply bfloat16. It makes code for each shape that it has not met.
bool use_onednn(const Tensor& x, const Tensor& w) {
#if defined(GRASSLAND_HAS_ONEDNN) && defined(__x86_64__)  // elsewhere not measured, and not every one takes bfloat16
  return is_half(x) && x.size(0) * w.numel() >= kWork && aoti_torch_cpu__linear_pointwise != nullptr &&
         aoti_torch_cpu__linear_pointwise_binary != nullptr;
#else
  return false;
#endif
}

template <typename T>
struct Matrix {
  T* at;
  int64_t row;  // numbers from one row to the next
};

#define GRASSLAND_SOURCE "linear_rows.h"
#include "units.h"

template <typename T>
Matrix<T> matrix(const Tensor& x) {
  return {data<T>(x), x.stride(0)};
}

// Rows of so many numbers that they are worth a thread.
int64_t grain(int64_t columns) { return std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, columns)); }

template <typename From, typename To>
void put_as(const Tensor& from, const Tensor& to, bool add) {
  const int64_t columns = from.size(1);
  torch::stable::parallel_for(0, from.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(put_rows)(matrix<From>(from), matrix<To>(to), columns, begin, end, add);
  });
}

// A weight whose rows or columns lie side by side: others oneDNN multiplies a thousand times slower, and ATen copies columns
// number by number.
Tensor dense(const Tensor& w) {
  if (w.stride(0) == 1 && w.stride(1) != 1) return flipped(dense(flipped(w)));
  if (w.stride(1) != 1) return torch::stable::contiguous(w);
  if (w.stride(0) == w.size(1)) return w;
  const Tensor out = empty(w, {w.size(0), w.size(1)}, w.scalar_type());
  put(w, out);
  return out;
}

// x, whose rows or columns lie side by side, in float32
Tensor widened(const Tensor& x) {
  if (!is_half(x)) return x;
  if (x.stride(1) != 1) return x.stride(0) == 1 ? flipped(widened(flipped(x))) : widened(torch::stable::contiguous(x));
  const Tensor out = empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  put(x, out);
  return out;
}

Tensor widened_row(const Tensor& x) {
  const Tensor row = torch::stable::view(x, {1, x.size(0)});
  return torch::stable::view(widened(row), {x.size(0)});
}

Tensor narrowed(const Tensor& x) {
  const Tensor out = empty(x, {x.size(0), x.size(1)}, ScalarType::BFloat16);
  put(x, out);
  return out;
}

#ifdef GRASSLAND_HAS_ONEDNN
Tensor onednn(const Tensor& x, const Tensor& w, const Tensor* bias) {
  AtenTensorHandle out, added = bias == nullptr ? nullptr : bias->get();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
      x.get(), dense(w).get(), bias == nullptr ? nullptr : &added, "none", nullptr, 0, nullptr, &out));
  return Tensor(out);
}

Tensor onednn_plus(const Tensor& sum, const Tensor& x, const Tensor& w) {
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise_binary(x.get(), sum.get(), dense(w).get(), nullptr, "add", &out));
  return Tensor(out);
}
#else
Tensor onednn(const Tensor& x, const Tensor&, const Tensor*) { return x; }
Tensor onednn_plus(const Tensor& sum, const Tensor&, const Tensor&) { return sum; }
#endif

// to = left^T right, all bfloat16 and multiplied as such
void halves_product(const Tensor& to, const Tensor& left, const Tensor& right) {
  paired_outer_fits(left, right) ? paired_outer(to, left, right, false) : mm(to, flipped(left), right);
}

}  // namespace

bool multiplies_halves() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool found = [] {
    unsigned features, b, c, d;
    return __builtin_cpu_supports("avx512bw") && __get_cpuid_count(7, 1, &features, &b, &c, &d) && (features >> 5 & 1) != 0;
  }();
  return found;
#else
  return false;
#endif
}

Tensor linear(const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor* room) {
  const bool tiles = tiled_fits(x, w);
  if (!tiles && is_half(x) && !multiplies_halves()) {
    if (bias == nullptr) return narrowed(linear(widened(x), widened(w)));
    const Tensor wide = widened_row(*bias);
    return narrowed(linear(widened(x), widened(w), &wide));
  }
  const bool pairs = !tiles && paired_fits(x, w);
  if (!tiles && !pairs && use_onednn(x, w)) return onednn(x, w, bias);
  const Tensor out = room != nullptr ? *room : empty(x, {x.size(0), w.size(0)}, x.scalar_type());
  if (tiles)
    tiled(out, x, w, bias, false);
  else if (pairs)
    paired(out, x, w, bias, false);
  else if (bias == nullptr)
    mm(out, x, flipped(w));
  else
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), bias->get(), x.get(), flipped(w).get(), 1.0, 1.0));
  return out;
}

namespace {

Tensor linear_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  return linear(x, w, bias ? &*bias : nullptr);
}

Tensor linear_weight_backward(const Tensor& grad, const Tensor& x) {
  OuterSum sum(grad.size(1), x.size(1));
  sum.add(grad, x);
  return sum.result(grad);
}

}  // namespace

void put(const Tensor& from, const Tensor& to, bool add) {
  if (is_half(from))
    is_half(to) ? put_as<bf16, bf16>(from, to, add) : put_as<bf16, float>(from, to, add);
  else
    is_half(to) ? put_as<float, bf16>(from, to, add) : put_as<float, float>(from, to, add);
}

Tensor plus_linear(const Tensor& sum, const Tensor& x, const Tensor& w) {
  if (tiled_fits(x, w)) {
    tiled(sum, x, w, nullptr, true);
  } else if (is_half(x) && !multiplies_halves()) {
    return narrowed(plus_linear(widened(sum), widened(x), widened(w)));
  } else if (paired_fits(x, w)) {
    paired(sum, x, w, nullptr, true);
  } else if (use_onednn(x, w)) {
    return onednn_plus(sum, x, w);
  } else if (!is_half(x) && x.size(0) <= kFewRows) {
    // Apart: MKL adds the terms for few rows one by one to what is there, and rounds each to the precision of that.
    put(linear(x, w), sum, true);
  } else {
    addmm(sum, x, flipped(w), 1.0);
  }
  return sum;
}

Tensor& OuterSum::total(const Tensor& like) {
  if (!total_) total_ = empty(like, {m_, h_}, ScalarType::Float);
  return *total_;
}

void OuterSum::fold() {
  for (const Tensor& half : halves_) {
    put(half, total(half), held_);
    held_ = true;
  }
  halves_.clear();
}

void OuterSum::add(const Tensor& left, const Tensor& right) {
  if (left.numel() == 0 || right.numel() == 0) return;
  const bool floats = total_ || dtype_ == ScalarType::Float;
  if (floats && paired_outer_fits(left, right)) {
    paired_outer(total(left), left, right, held_);
  } else if (tiled_outer_fits(left, right)) {
    tiled_outer(total(left), left, right, held_);
  } else if (is_half(left) && !multiplies_halves()) {
    add(widened(left), widened(right));
  } else if (is_half(left)) {
    if (halves_.size() == 2) fold();
    halves_.push_back(empty(left, {m_, h_}, ScalarType::BFloat16));
    halves_product(halves_.back(), left, right);
    if (total_) fold();
    return;
  } else if (held_) {
    addmm(total(left), flipped(left), right, 1.0);
  } else {
    mm(total(left), flipped(left), right);
  }
  held_ = true;
}

Tensor OuterSum::result(const Tensor& like) {
  if (dtype_ == ScalarType::BFloat16 && !total_ && !halves_.empty()) {
    if (halves_.size() == 2) put(halves_[1], halves_[0], true);
    return halves_[0];
  }
  fold();
  Tensor& to = total(like);
  if (!held_) torch::stable::zero_(to);
  if (dtype_ == ScalarType::Float) return to;
  const Tensor narrow = empty(like, {m_, h_}, dtype_);
  put(to, narrow);
  return narrow;
}

void outer_product(const Tensor& total, const Tensor& left, const Tensor& right, bool add) {
  if (total.scalar_type() == ScalarType::Float) {
    OuterSum sum(total, add);
    sum.add(left, right);
    sum.result(total);
  } else if (!multiplies_halves()) {
    OuterSum sum(total.size(0), total.size(1));
    sum.add(left, right);
    put(sum.result(total), total, add);
  } else if (add) {
    addmm(total, flipped(left), right, 1.0);
  } else {
    halves_product(total, left, right);
  }
}

}  // namespace grassland

// kernels/products.py checks: x (n, k), weight (m, k) and bias (m), not empty, float32 or bfloat16 alike; for the gradient
// of the weight, float32 and contiguous.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_weight_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("tiles_are_best() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("linear", TORCH_BOX(&grassland::linear_cpu));
  m.impl("linear_weight_backward", TORCH_BOX(&grassland::linear_weight_backward));
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CompositeExplicitAutograd, m) {
  m.impl("tiles_are_best", TORCH_BOX(&grassland::tiles_are_best));
}
