// BatchNorm, the addition of a shortcut and ReLU in one pass over channels-last activations.
//
// All tensors are (P, C) rows of P pixels, C channels innermost, in fp32 or bfloat16; sums are
// fp32 over 64 rows, then fp64. Plain loops over C that the compiler turns into vector code.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using at::Tensor;

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }
inline float load(bf16 v) {
  uint32_t wide = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline void store(float* to, float v) { *to = v; }
inline void store(bf16* to, float v) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &v, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  to->bits = uint16_t(v == v ? rounded : 0x7fc0);
}

constexpr int64_t kRows = 64;  // summed in fp32 before they go into fp64

// Calls work(first row, last row, sums of this part) on one part of the rows per thread and adds
// the 2 * C sums up in the order of the parts: the same threads, the same result.
template <class Work>
std::vector<double> sum_rows(int64_t P, int64_t C, Work work) {
  int64_t parts = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(P / kRows, 1));
  std::vector<std::vector<double>> partial(parts, std::vector<double>(2 * C, 0.0));
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; part++) {
      std::vector<float> sums(2 * C);
      int64_t last = P * (part + 1) / parts;
      for (int64_t row = P * part / parts; row < last; row += kRows) {
        std::fill(sums.begin(), sums.end(), 0.f);
        work(row, std::min(row + kRows, last), sums.data(), sums.data() + C);
        for (int64_t c = 0; c < 2 * C; c++) partial[part][c] += sums[c];
      }
    }
  });
  for (int64_t part = 1; part < parts; part++)
    for (int64_t c = 0; c < 2 * C; c++) partial[0][c] += partial[part][c];
  return partial[0];
}

template <class T>
void moments(const T* x, int64_t P, int64_t C, double* mean, double* var) {
  std::vector<float> shift(C);  // the first pixel: sums of squares then do not cancel
  for (int64_t c = 0; c < C; c++) shift[c] = load(x[c]);
  const float* s = shift.data();
  auto sums = sum_rows(P, C, [&](int64_t row, int64_t last, float* __restrict a, float* __restrict b) {
    for (; row < last; row++) {
      const T* __restrict p = x + row * C;
      for (int64_t c = 0; c < C; c++) {
        float v = load(p[c]) - s[c];
        a[c] += v;
        b[c] += v * v;
      }
    }
  });
  for (int64_t c = 0; c < C; c++) {
    double m = sums[c] / P;
    mean[c] = m + s[c];
    var[c] = std::max(sums[C + c] / P - m * m, 0.0);
  }
}

template <class T, bool kAdd, bool kRelu>
void affine_rows(const T* x, const T* add, T* y, int64_t P, int64_t C, const float* scale,
                 const float* shift) {
  at::parallel_for(0, P, kRows, [&](int64_t row, int64_t last) {
    for (; row < last; row++) {
      const T* __restrict p = x + row * C;
      const T* __restrict q = kAdd ? add + row * C : nullptr;
      T* __restrict r = y + row * C;
      for (int64_t c = 0; c < C; c++) {
        float v = load(p[c]) * scale[c] + shift[c];
        if (kAdd) v += load(q[c]);
        if (kRelu) v = v < 0 ? 0 : v;
        store(r + c, v);
      }
    }
  });
}

template <class T, bool kRelu>
void backward_rows(const T* dy, const T* x, const T* y, T* dx, T* dadd, int64_t P, int64_t C,
                   const float* weight, const float* mean, const float* invstd, float* dweight,
                   float* dbias) {
  auto sums = sum_rows(P, C, [&](int64_t row, int64_t last, float* __restrict a, float* __restrict b) {
    for (; row < last; row++) {
      const T *__restrict g = dy + row * C, *__restrict p = x + row * C;
      const T* __restrict r = kRelu ? y + row * C : nullptr;
      for (int64_t c = 0; c < C; c++) {
        float d = load(g[c]);
        if (kRelu) d = load(r[c]) > 0 ? d : 0;
        a[c] += d;
        b[c] += d * (load(p[c]) - mean[c]);
      }
    }
  });
  std::vector<float> scale(C), slope(C), offset(C);
  for (int64_t c = 0; c < C; c++) {
    double a = double(weight[c]) * invstd[c], k = sums[C + c] * invstd[c];  // k: sum of dy * xhat
    dbias[c] = sums[c];
    dweight[c] = k;
    scale[c] = a;
    slope[c] = -a * invstd[c] * k / P;
    offset[c] = -a * sums[c] / P - double(slope[c]) * mean[c];
  }
  const float *s = scale.data(), *k = slope.data(), *o = offset.data();
  at::parallel_for(0, P, kRows, [&](int64_t row, int64_t last) {
    for (; row < last; row++) {
      const T *__restrict g = dy + row * C, *__restrict p = x + row * C;
      const T* __restrict r = kRelu ? y + row * C : nullptr;
      T* __restrict out = dx + row * C;
      T* __restrict also = dadd ? dadd + row * C : nullptr;
      for (int64_t c = 0; c < C; c++) {
        float d = load(g[c]);
        if (kRelu) d = load(r[c]) > 0 ? d : 0;
        store(out + c, s[c] * d + k[c] * load(p[c]) + o[c]);
      }
      if (also)
        for (int64_t c = 0; c < C; c++) {
          float d = load(g[c]);
          if (kRelu) d = load(r[c]) > 0 ? d : 0;
          store(also + c, d);
        }
    }
  });
}

template <class T>
T* data(const Tensor& t) {
  return t.defined() ? reinterpret_cast<T*>(t.data_ptr()) : nullptr;
}

template <class Call>
void by_type(const Tensor& x, Call call) {
  if (x.scalar_type() == at::kFloat)
    call(float());
  else
    call(bf16());
}

void check(const Tensor& t, const Tensor& like, const char* name) {
  TORCH_CHECK(!t.defined() || (t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type() &&
                               t.is_contiguous(at::MemoryFormat::ChannelsLast)),
              name, ": not a channels-last tensor like x");
}

void check_input(const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 4 && x.numel() > 0 &&
                  x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                  (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "x: give a channels-last (N, C, H, W) CPU tensor in fp32 or bfloat16");
}

void check_channels(const Tensor& t, int64_t C, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == C, name,
              ": give an fp32 tensor with one value per channel");
}

// y = x * scale + shift (+ add), with ReLU if asked for; scale and shift (C,) in fp32
Tensor affine(const Tensor& x, const Tensor& scale, const Tensor& shift,
              const std::optional<Tensor>& add, bool relu) {
  check_input(x);
  Tensor other = add.value_or(Tensor());
  check(other, x, "add");
  int64_t C = x.size(1), P = x.numel() / C;
  check_channels(scale, C, "scale");
  check_channels(shift, C, "shift");
  Tensor y = at::empty_like(x);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    auto rows = other.defined() ? (relu ? affine_rows<T, true, true> : affine_rows<T, true, false>)
                                : (relu ? affine_rows<T, false, true> : affine_rows<T, false, false>);
    rows(data<T>(x), data<T>(other), data<T>(y), P, C, data<float>(scale), data<float>(shift));
  });
  return y;
}

// mean and biased variance (C,) of a batch, in fp64
std::tuple<Tensor, Tensor> batch_moments(const Tensor& x) {
  check_input(x);
  int64_t C = x.size(1), P = x.numel() / C;
  Tensor mean = at::empty({C}, at::kDouble), var = at::empty({C}, at::kDouble);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    moments<T>(data<T>(x), P, C, data<double>(mean), data<double>(var));
  });
  return {mean, var};
}

// gradients of x, add (if wanted), weight and bias; y is the forward's result where it had a ReLU
std::tuple<Tensor, std::optional<Tensor>, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y, const Tensor& weight,
    const Tensor& mean, const Tensor& invstd, bool want_add) {
  check_input(x);
  check(dy, x, "dy");
  Tensor out = y.value_or(Tensor());
  check(out, x, "y");
  int64_t C = x.size(1), P = x.numel() / C;
  check_channels(weight, C, "weight");
  check_channels(mean, C, "mean");
  check_channels(invstd, C, "invstd");
  Tensor dx = at::empty_like(x), dweight = at::empty({C}, at::kFloat), dbias = at::empty_like(dweight);
  Tensor dadd = want_add ? at::empty_like(x) : Tensor();
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    auto rows = out.defined() ? backward_rows<T, true> : backward_rows<T, false>;
    rows(data<T>(dy), data<T>(x), data<T>(out), data<T>(dx), data<T>(dadd), P, C,
         data<float>(weight), data<float>(mean), data<float>(invstd), data<float>(dweight),
         data<float>(dbias));
  });
  return {dx, want_add ? std::optional<Tensor>(dadd) : std::nullopt, dweight, dbias};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("affine", &affine);
  m.def("batch_moments", &batch_moments);
  m.def("backward", &backward);
}
