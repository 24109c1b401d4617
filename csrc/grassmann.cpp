// Riemannian SGD with momentum on a product of Grassmannians, without SVD (arXiv 2308.01547; algebra in
// kernels/subspace/eager.py). One class a task: its rows of S^T and of the momentum stay in the cache.
//
//   B <- mu B + D,  A = S^T B,  C = B^T B,  H = a^2 (C - A^T A),  a = -lr
//   S+ = S (cos - a A sinc) + B a sinc,  cos and sinc power series in H
//
// All n-sized work is the Gram matrix of the 2k rows [S; B] and the product of a k x 2k matrix with them. Where B is
// nearly radial, C - A^T A cancels: the horizontal part G = B - S A then takes the place of B.
#include "vec.h"

namespace grassland {
namespace {

enum Mode : int64_t { kOfficial = 0, kProject = 1, kTransport = 2 };

constexpr int kSeries = 9;       // powers of H at most
constexpr double kTerm = 1e-15;  // what the powers left out add at most
constexpr double kTrace = 1.0;   // angles are halved until the trace of H is below
constexpr int kHalvings = 40;
// B is replaced by G from this |A|^2 / |G|^2 on, or this a^2 |A|^2: the radial parts of S+ would cancel too.
constexpr double kRadial = 16;
constexpr double kTurn = 0.25;
constexpr int64_t kColumns = 64;
constexpr int64_t kCached = 4096;  // numbers of S, and as many of B, that stay in the first cache

using Matrix = std::vector<double>;  // k x k, by rows

struct Step {
  float *weight, *buffer;
  const float* grad;
  int64_t k, n;
  double lr;
  float momentum;
  int64_t mode;
};

// What one class needs besides its rows: s = S^T S, cross = S^T X, c = X^T X for the rows X that are B, or G itself, and a,
// what projects X to G = X - S a: cross, or 0; squared = G^T G.
struct Scratch {
  int64_t k;
  Matrix a, c, s, cross, h, squared, u, sinc, p, q, excess, spare, turned, turned_q;
  std::vector<float> top_x, top_y, bottom_x, bottom_y, moved, stored, horizontal;
  explicit Scratch(int64_t k)
      : k(k), a(k * k), c(k * k), s(k * k), cross(k * k), h(k * k), squared(k * k), u(k * k), sinc(k * k), p(k * k),
        q(k * k), excess(k * k), spare(k * k), turned(k * k), turned_q(k * k), top_x(k * k), top_y(k * k),
        bottom_x(k * k), bottom_y(k * k), moved(k * kColumns), stored(k * kColumns) {}
};

#define GRASSLAND_SOURCE "grassmann_rows.h"
#include "units.h"

void grassmann_step_cpu(Tensor weight, Tensor buffer, const Tensor& grad, int64_t k, double lr, double momentum,
                        int64_t mode) {
  const Step s{data<float>(weight), data<float>(buffer), data<float>(grad), k, weight.size(1), lr,
               static_cast<float>(momentum), mode};
  torch::stable::parallel_for(0, weight.size(0) / k, 1, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(step_classes)(s, begin, end);
  });
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous float32 by kernels/subspace/op.py.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "grassmann_step_(Tensor(a!) weight, Tensor(b!) buffer, Tensor grad, int k, float lr, float momentum, int mode) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) { m.impl("grassmann_step_", TORCH_BOX(&grassland::grassmann_step_cpu)); }
