// Training with the surviving kernels only: a conv forward, the gradients of its input and of its
// kernels, and BatchNorm with what follows it, on blocks of images as in interleaved.h.
//
// Activations are [blocks][C][plane][lanes], in float or, where the processor multiplies pairs of
// them, bfloat16; sums are float, those over whole planes double. training.py checks shapes. Each
// result is summed in an order that the number of threads does not change.
#include <cmath>

#include "interleaved.h"

#if defined(__AVX512BF16__)
#define PAIRS 1
#define HALVES Brain
#else
#define PAIRS 0
#define HALVES float  // never used
#endif

namespace {

using V = Types<float>::V;
constexpr int LANES = Types<float>::lanes;
constexpr int64_t CACHE = 1 << 22;  // bytes that a thread walks over for each kernel

extern "C" struct Planes {  // one activation
    int32_t blocks, channels, height, width;
};

inline int64_t stride_of(const Planes& a) { return block_plane(a.height, a.width) * LANES; }

// A conv, or with kernels turned round and channels for filters the gradient of its input
template <class T>
void conv(const T* in, T* out, const Planes& a, const Planes& o, int kernel, int stride,
          const int32_t* weight, const float* bias, const int32_t* start, const int32_t* index,
          int threads) {
    // few blocks for many threads: the filters are shared, too
    const int parts = std::min(o.channels, (2 * threads + a.blocks - 1) / a.blocks);
    const int groups = a.blocks % threads == 0 ? 1 : parts;
    const int64_t from = a.channels * stride_of(a), plane = stride_of(o);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int task = 0; task < a.blocks * groups; ++task) {
        const int b = task / groups, part = task % groups;
        const int f0 = (int)split(o.channels, part, groups);
        const int f1 = (int)split(o.channels, part + 1, groups);
        const Axis axis = {kernel, stride, kernel / 2, 1};
        Op op = {.kind = CONV, .rows = axis, .columns = axis, .groups = 1, .bias = bias + f0};
        (Source<T>::channels == 2 ? op.pair_weight : op.weight) = weight;
        (Source<T>::channels == 2 ? op.pair_start : op.start) = start + f0;
        (Source<T>::channels == 2 ? op.pair_index : op.index) = index;
        const Tensor x = {0, 0, a.channels, a.height, a.width};
        const Tensor y = {0, 0, f1 - f0, o.height, o.width};
        conv_block<T>(op, x, y, in + b * from, nullptr,
                      out + (int64_t(b) * o.channels + f0) * plane, 0, 1);
    }
}

// Neighbouring pixels of a row, as many as a register holds; `between` is half a step further back
template <class T>
struct Row;

template <>
struct Row<float> {
    using Step = V;
    static constexpr int pixels = 1;
    static FORCED Step at(const float* p) { return load(p); }
    static FORCED Step last(const float* p) { return load(p); }
    static FORCED Step before(Step previous, Step) { return previous; }
    static FORCED Step after(Step, Step next) { return next; }
    static FORCED V add(V sum, Step g, Step x) { return sum + g * x; }
};

#if PAIRS
template <>
struct Row<Brain> {
    using Step = __m512i;
    static constexpr int pixels = 2;
    static FORCED Step at(const Brain* p) { return _mm512_loadu_si512(p); }
    static FORCED Step last(const Brain* p) {  // a row of odd length ends with half a step
        return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    }
    static FORCED Step before(Step previous, Step x) {
        return _mm512_shuffle_i64x2(previous, x, 0x4e);
    }
    static FORCED Step after(Step x, Step next) { return _mm512_shuffle_i64x2(x, next, 0x4e); }
    static FORCED V add(V sum, Step g, Step x) {
        return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)g, (__m512bh)x);
    }
};
#endif

// One row of outputs' share of the nine sums; UP and DOWN: whether there is a row above and below
template <class T, bool UP, bool DOWN>
FORCED inline void add_row(const T* g, const T* x, int width, V (&sums)[3][3]) {
    using R = Row<T>;
    constexpr int STEP = R::pixels * LANES, FIRST = UP ? 0 : 1, LAST = DOWN ? 3 : 2;
    const int steps = (width + R::pixels - 1) / R::pixels;
    const bool odd = width % R::pixels;
    const auto at = [&](const T* p, int s) FORCED {
        return odd && s == steps - 1 ? R::last(p + s * STEP) : R::at(p + s * STEP);
    };
    typename R::Step previous[3], now[3];
    const T* rows[3];
    repeat<LAST - FIRST>([&](auto i) FORCED {
        rows[i + FIRST] = x + (i + FIRST - 1) * int64_t(width) * LANES;
        previous[i + FIRST] = typename R::Step{};
        now[i + FIRST] = at(rows[i + FIRST], 0);
    });
    for (int s = 0; s < steps; ++s) {
        const auto gradient = at(g, s);
        repeat<LAST - FIRST>([&](auto i) FORCED {
            constexpr int r = i + FIRST;
            const auto next = s + 1 < steps ? at(rows[r], s + 1) : typename R::Step{};
            sums[r][0] = R::add(sums[r][0], gradient, R::before(previous[r], now[r]));
            sums[r][1] = R::add(sums[r][1], gradient, now[r]);
            sums[r][2] = R::add(sums[r][2], gradient, R::after(now[r], next));
            previous[r] = now[r];
            now[r] = next;
        });
    }
}

// The gradient of one 3 x 3 kernel from planes of one block: outputs g, inputs x, of one size
template <class T>
void add_plane(const T* g, const T* x, int height, int width, V (&sums)[3][3]) {
    const int64_t row = int64_t(width) * LANES;
    if (height == 1) return add_row<T, false, false>(g, x, width, sums);
    add_row<T, false, true>(g, x, width, sums);
    for (int y = 1; y < height - 1; ++y)
        add_row<T, true, true>(g + y * row, x + y * row, width, sums);
    add_row<T, true, false>(g + (height - 1) * row, x + (height - 1) * row, width, sums);
}

// The same of a 1 x 1 kernel
template <class T>
V plane_product(const T* g, const T* x, int64_t pixels) {
    using R = Row<T>;
    constexpr int STEP = R::pixels * LANES, CHAINS = 8;
    V sums[CHAINS] = {};
    int64_t i = 0;
    const int64_t end = pixels / R::pixels * STEP;
    for (; i + CHAINS * STEP <= end; i += CHAINS * STEP)
        repeat<CHAINS>([&](auto n) FORCED {
            sums[n] = R::add(sums[n], R::at(g + i + n * STEP), R::at(x + i + n * STEP));
        });
    for (; i < end; i += STEP) sums[0] = R::add(sums[0], R::at(g + i), R::at(x + i));
    if (pixels % R::pixels) sums[0] = R::add(sums[0], R::last(g + i), R::last(x + i));
    for (int n = 1; n < CHAINS; ++n) sums[0] += sums[n];
    return sums[0];
}

// The sum of a vector's lanes, by halves
template <int N, class Lanes>
FORCED inline float total(Lanes v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        typedef float Half __attribute__((vector_size(N / 2 * sizeof(float))));
        Half low, high;
        std::memcpy(&low, &v, sizeof(Half));
        std::memcpy(&high, (const char*)&v + sizeof(Half), sizeof(Half));
        return total<N / 2>(low + high);
    }
}

// Adds the gradients of the kernels (f[k], c[k]) to out, from scalar at[k] on. Each thread has its
// share of the kernels and walks over so many blocks at once as its cache holds.
template <class T>
void kernel_gradients(const T* g, const T* x, const Planes& o, const Planes& a, const int32_t* f,
                      const int32_t* c, const int64_t* at, int64_t kernels, int size, int64_t down,
                      int64_t right, float* out, int threads) {
    const int64_t plane = stride_of(a);
    const int64_t bytes = (a.channels + o.channels) * plane * int64_t(sizeof(T));
    const int at_once = (int)std::clamp<int64_t>(CACHE / bytes, 1, a.blocks);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
        for (int first = 0; first < a.blocks; first += at_once) {
            const int64_t last = split(kernels, part + 1, threads);
            for (int64_t k = split(kernels, part, threads); k < last; ++k) {
                V sums[3][3] = {};
                for (int b = first; b < std::min(first + at_once, a.blocks); ++b) {
                    const T* from = g + (int64_t(b) * o.channels + f[k]) * plane;
                    const T* with = x + (int64_t(b) * a.channels + c[k]) * plane;
                    if (size == 3)
                        add_plane(from, with, a.height, a.width, sums);
                    else
                        sums[0][0] += plane_product(from, with, int64_t(a.height) * a.width);
                }
                for (int r = 0; r < size; ++r)
                    for (int s = 0; s < size; ++s)
                        out[at[k] + r * down + s * right] += total<LANES>(sums[r][s]);
            }
        }
}

// Calls each(b, first scalar) for the planes of a channel
template <class Each>
inline void planes_of(const Planes& a, int c, Each each) {
    for (int b = 0; b < a.blocks; ++b) each((int64_t(b) * a.channels + c) * stride_of(a));
}

inline double sum_of(V v) {
    double sum = 0;
    for (int i = 0; i < LANES; ++i) sum += v[i];
    return sum;
}

// The sums of two values over a channel; value(i) gives both at scalar i
template <class Value>
inline std::pair<double, double> channel_sums(const Planes& a, int c, Value value) {
    constexpr int CHAINS = 4;
    double first = 0, second = 0;
    const int64_t end = int64_t(a.height) * a.width * LANES;
    planes_of(a, c, [&](int64_t at) {
        V sums[CHAINS] = {}, more[CHAINS] = {};
        int64_t i = 0;
        const auto add = [&](int chain, int64_t i) FORCED {
            const auto [p, q] = value(at + i);
            sums[chain] += p;
            more[chain] += q;
        };
        for (; i + CHAINS * LANES <= end; i += CHAINS * LANES)
            repeat<CHAINS>([&](auto n) FORCED { add(n, i + n * LANES); });
        for (; i < end; i += LANES) add(0, i);
        repeat<CHAINS>([&](auto n) FORCED {
            first += sum_of(sums[n]);
            second += sum_of(more[n]);
        });
    });
    return {first, second};
}

template <class T>
void affine(const T* x, const T* add, T* y, const Planes& a, int c, float scale, float shift,
            bool relu) {
    const int64_t end = int64_t(a.height) * a.width * LANES;
    const V s = splat(scale), t = splat(shift);
    planes_of(a, c, [&](int64_t at) {
        for (int64_t i = at; i < at + end; i += LANES) {
            V v = load(x + i) * s + t;
            if (add) v += load(add + i);
            store(y + i, relu ? rectified(v) : v);
        }
    });
}

template <class T>
void norm(const T* x, const T* add, T* y, const Planes& a, const float* weight, const float* bias,
          double eps, bool relu, float* mean, float* var, float* invstd, int threads) {
    const double count = double(a.blocks) * a.height * a.width * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int c = 0; c < a.channels; ++c) {
        // squares of differences from one of the values do not cancel
        const float about = load(x + c * stride_of(a))[0];
        const V shift = splat(about);
        const auto [sum, square] = channel_sums(a, c, [&](int64_t i) FORCED {
            const V v = load(x + i) - shift;
            return std::pair(v, v * v);
        });
        const double m = sum / count, v = std::max(square / count - m * m, 0.0);
        mean[c] = float(m + about);
        var[c] = float(v);
        invstd[c] = float(1 / std::sqrt(v + eps));
        const float scale = weight[c] * invstd[c];
        affine(x, add, y, a, c, scale, bias[c] - mean[c] * scale, relu);
    }
}

// y: the result where a ReLU made it, else null; dadd: null where it is not wanted
template <class T>
void norm_back(const T* dy, const T* x, const T* y, T* dx, T* dadd, const Planes& a,
               const float* weight, const float* mean, const float* invstd, float* dweight,
               float* dbias, int threads) {
    const double count = double(a.blocks) * a.height * a.width * LANES;
    const int64_t end = int64_t(a.height) * a.width * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int c = 0; c < a.channels; ++c) {
        const V middle = splat(mean[c]);
        const auto passed = [&](int64_t i) FORCED {
            const V d = load(dy + i);
            return y ? (load(y + i) > V{} ? d : V{}) : d;
        };
        const auto [sum, product] = channel_sums(a, c, [&](int64_t i) FORCED {
            const V d = passed(i);
            return std::pair(d, d * (load(x + i) - middle));
        });
        const double scale = double(weight[c]) * invstd[c], hat = product * invstd[c];
        dbias[c] = float(sum);
        dweight[c] = float(hat);
        const double slope = -scale * invstd[c] * hat / count;
        const V s = splat(float(scale)), k = splat(float(slope)),
                t = splat(float(-scale * sum / count - slope * mean[c]));
        planes_of(a, c, [&](int64_t at) {
            for (int64_t i = at; i < at + end; i += LANES) {
                const V d = passed(i);
                store(dx + i, s * d + k * load(x + i) + t);
                if (dadd) store(dadd + i, d);
            }
        });
    }
}

}  // namespace

extern "C" {

int training_lanes() { return LANES; }
int training_halves() { return PAIRS; }
int64_t training_plane(int height, int width) { return block_plane(height, width); }

// Kernels as conv_tile reads them: `at` scalars into weight for each (pairs of them in bfloat16, -1
// for no kernel), taps turned round where `turned`.
void training_pack(const float* weight, const int64_t* at, int64_t kernels, int64_t down,
                   int64_t right, int size, int turned, int half, int32_t* words, int threads) {
    const int taps = size * size, each = half ? 2 : 1;
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < kernels; ++k)
        for (int tap = 0; tap < taps; ++tap) {
            const int from = turned ? taps - 1 - tap : tap;
            const int64_t offset = from / size * down + from % size * right;
            float values[2] = {};
            for (int i = 0; i < each; ++i)
                if (at[k * each + i] >= 0) values[i] = weight[at[k * each + i] + offset];
            if (half) {
                const Brain pair[2] = {Brain(values[0]), Brain(values[1])};
                std::memcpy(words + k * taps + tap, pair, 4);
            } else {
                std::memcpy(words + k * taps + tap, values, 4);
            }
        }
}

void training_conv(const void* in, void* out, const Planes* a, const Planes* o, int kernel,
                   int stride, const int32_t* weight, const float* bias, const int32_t* start,
                   const int32_t* index, int half, int threads) {
#if PAIRS
    if (half)
        return conv((const Brain*)in, (Brain*)out, *a, *o, kernel, stride, weight, bias, start,
                    index, threads);
#endif
    conv((const float*)in, (float*)out, *a, *o, kernel, stride, weight, bias, start, index, threads);
}

void training_kernels(const void* g, const void* x, const Planes* o, const Planes* a,
                      const int32_t* f, const int32_t* c, const int64_t* at, int64_t kernels,
                      int size, int64_t down, int64_t right, float* out, int half, int threads) {
#if PAIRS
    if (half)
        return kernel_gradients((const Brain*)g, (const Brain*)x, *o, *a, f, c, at, kernels, size,
                                down, right, out, threads);
#endif
    kernel_gradients((const float*)g, (const float*)x, *o, *a, f, c, at, kernels, size, down, right,
                     out, threads);
}

// The sum of each channel
void training_sums(const void* x, const Planes* a, float* out, int half, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int c = 0; c < a->channels; ++c) {
        const auto sum = [&](auto* x) {
            return channel_sums(*a, c, [&](int64_t i) FORCED { return std::pair(load(x + i), V{}); });
        };
        out[c] = float((half ? sum((const HALVES*)x) : sum((const float*)x)).first);
    }
}

void training_norm(const void* x, const void* add, void* y, const Planes* a, const float* weight,
                   const float* bias, double eps, int relu, float* mean, float* var, float* invstd,
                   int half, int threads) {
#if PAIRS
    if (half)
        return norm((const Brain*)x, (const Brain*)add, (Brain*)y, *a, weight, bias, eps, relu,
                    mean, var, invstd, threads);
#endif
    norm((const float*)x, (const float*)add, (float*)y, *a, weight, bias, eps, relu, mean, var,
         invstd, threads);
}

void training_affine(const void* x, const void* add, void* y, const Planes* a, const float* scale,
                     const float* shift, int relu, int half, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int c = 0; c < a->channels; ++c) {
#if PAIRS
        if (half) {
            affine((const Brain*)x, (const Brain*)add, (Brain*)y, *a, c, scale[c], shift[c], relu);
            continue;
        }
#endif
        affine((const float*)x, (const float*)add, (float*)y, *a, c, scale[c], shift[c], relu);
    }
}

void training_norm_back(const void* dy, const void* x, const void* y, void* dx, void* dadd,
                        const Planes* a, const float* weight, const float* mean,
                        const float* invstd, float* dweight, float* dbias, int half, int threads) {
#if PAIRS
    if (half)
        return norm_back((const Brain*)dy, (const Brain*)x, (const Brain*)y, (Brain*)dx,
                         (Brain*)dadd, *a, weight, mean, invstd, dweight, dbias, threads);
#endif
    norm_back((const float*)dy, (const float*)x, (const float*)y, (float*)dx, (float*)dadd, *a,
              weight, mean, invstd, dweight, dbias, threads);
}
}
