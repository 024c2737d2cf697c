// BatchNorm, the addition of a shortcut and ReLU in one pass over channels-last activations.
//
// Activations are P rows (pixels) of C channels, in fp32 or bfloat16; what is per channel is fp32,
// and sums are fp32 over 64 rows, then fp64. Plain loops over C that the compiler turns into vector
// code. fused.py checks shapes and types; nothing here allocates more than a few rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

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
std::vector<double> sum_rows(int64_t P, int64_t C, int threads, Work work) {
  std::vector<std::vector<double>> partial(threads, std::vector<double>(2 * C, 0.0));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; part++) {
    std::vector<float> sums(2 * C);
    int64_t last = P * (part + 1) / threads;
    for (int64_t row = P * part / threads; row < last; row += kRows) {
      std::fill(sums.begin(), sums.end(), 0.f);
      work(row, std::min(row + kRows, last), sums.data(), sums.data() + C);
      for (int64_t c = 0; c < 2 * C; c++) partial[part][c] += sums[c];
    }
  }
  for (int part = 1; part < threads; part++)
    for (int64_t c = 0; c < 2 * C; c++) partial[0][c] += partial[part][c];
  return partial[0];
}

template <class T>
void moments(const T* x, int64_t P, int64_t C, int threads, double* mean, double* var) {
  std::vector<float> shift(C);  // the first pixel: sums of squares then do not cancel
  for (int64_t c = 0; c < C; c++) shift[c] = load(x[c]);
  const float* s = shift.data();
  auto add_up = [&](int64_t row, int64_t last, float* __restrict a, float* __restrict b) {
    for (; row < last; row++) {
      const T* __restrict p = x + row * C;
      for (int64_t c = 0; c < C; c++) {
        float v = load(p[c]) - s[c];
        a[c] += v;
        b[c] += v * v;
      }
    }
  };
  auto sums = sum_rows(P, C, threads, add_up);
  for (int64_t c = 0; c < C; c++) {
    double m = sums[c] / P;
    mean[c] = m + s[c];
    var[c] = std::max(sums[C + c] / P - m * m, 0.0);
  }
}

template <class T, bool kAdd, bool kRelu>
void affine(const T* x, const T* add, T* y, int64_t P, int64_t C, int threads, const float* scale,
            const float* shift) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < P; row++) {
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
}

// The gradient that passes the ReLU whose results are r.
template <bool kRelu, class T>
inline float passed(const T* g, const T* r, int64_t c) {
  float d = load(g[c]);
  return !kRelu || load(r[c]) > 0 ? d : 0;
}

template <class T, bool kRelu>
void backward(const T* dy, const T* x, const T* y, T* dx, T* dadd, int64_t P, int64_t C,
              int threads, const float* weight, const float* mean, const float* invstd,
              float* dweight, float* dbias) {
  auto add_up = [&](int64_t row, int64_t last, float* __restrict a, float* __restrict b) {
    for (; row < last; row++) {
      const T *__restrict g = dy + row * C, *__restrict p = x + row * C;
      const T* __restrict r = kRelu ? y + row * C : nullptr;
      for (int64_t c = 0; c < C; c++) {
        float d = passed<kRelu>(g, r, c);
        a[c] += d;
        b[c] += d * (load(p[c]) - mean[c]);
      }
    }
  };
  auto sums = sum_rows(P, C, threads, add_up);
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
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < P; row++) {
    const T *__restrict g = dy + row * C, *__restrict p = x + row * C;
    const T* __restrict r = kRelu ? y + row * C : nullptr;
    T* __restrict out = dx + row * C;
    for (int64_t c = 0; c < C; c++)
      store(out + c, s[c] * passed<kRelu>(g, r, c) + k[c] * load(p[c]) + o[c]);
    if (T* __restrict also = dadd ? dadd + row * C : nullptr)
      for (int64_t c = 0; c < C; c++) store(also + c, passed<kRelu>(g, r, c));
  }
}

template <class T>
void affine_any(const void* x, const void* add, void* y, int64_t P, int64_t C, int threads,
                const float* scale, const float* shift, int relu) {
  auto run = add ? (relu ? affine<T, true, true> : affine<T, true, false>)
                 : (relu ? affine<T, false, true> : affine<T, false, false>);
  run((const T*)x, (const T*)add, (T*)y, P, C, threads, scale, shift);
}

template <class T>
void backward_any(const void* dy, const void* x, const void* y, void* dx, void* dadd, int64_t P,
                  int64_t C, int threads, const float* weight, const float* mean,
                  const float* invstd, float* dweight, float* dbias) {
  auto run = y ? backward<T, true> : backward<T, false>;
  run((const T*)dy, (const T*)x, (const T*)y, (T*)dx, (T*)dadd, P, C, threads, weight, mean, invstd,
      dweight, dbias);
}

}  // namespace

// half: whether activations are bfloat16. add, y and dadd may be null: none, no ReLU, not wanted.
extern "C" {

void fused_moments(const void* x, int64_t P, int64_t C, int half, int threads, double* mean,
                   double* var) {
  if (half)
    moments((const bf16*)x, P, C, threads, mean, var);
  else
    moments((const float*)x, P, C, threads, mean, var);
}

void fused_affine(const void* x, const void* add, void* y, int64_t P, int64_t C, int half,
                  int threads, const float* scale, const float* shift, int relu) {
  (half ? affine_any<bf16> : affine_any<float>)(x, add, y, P, C, threads, scale, shift, relu);
}

void fused_backward(const void* dy, const void* x, const void* y, void* dx, void* dadd, int64_t P,
                    int64_t C, int half, int threads, const float* weight, const float* mean,
                    const float* invstd, float* dweight, float* dbias) {
  (half ? backward_any<bf16> : backward_any<float>)(dy, x, y, dx, dadd, P, C, threads, weight, mean,
                                                    invstd, dweight, dbias);
}
}
