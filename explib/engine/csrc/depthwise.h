// Convolutions of single images with one channel a filter.
#pragma once
#include "lanes.h"
#include "planes.h"

namespace {

// The activations that are no more than bounds; any other is left to do, where a call costs nothing
template <class T>
struct Bounds {
    using V = typename Types<T>::V;
    const bool enough, any;
    const V least, most;
    explicit Bounds(const Op& op)
        : enough(op.act == NONE || op.act == RELU || op.act == CLAMP),
          any(op.act == RELU || op.act == CLAMP),
          least(splat(T(op.act == RELU ? 0.0f : op.alpha))),
          most(splat(T(op.act == RELU ? INFINITY : op.beta))) {}
    FORCED V operator()(V value) const {
        return any ? at_most(at_least(value, least), most) : value;
    }
};

// K x K of stride 1, from the first tap's pixel on: N vectors of outputs. Neighbours of floats in long
// vectors are had faster by turning two of them than by loads across lines of the cache
template <int K, int N, class T>
FORCED inline void depthwise_rows(const T* x, int64_t pitch, const typename Types<T>::V* weights,
                                  typename Types<T>::V (&acc)[N]) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    constexpr bool TURNED = VECTOR_BYTES == 64 && sizeof(T) == 4;
    repeat<K>([&](auto ky) FORCED {
        const T* row = x + ky * pitch;
        V loaded[N + 1];
        if constexpr (TURNED)
            repeat<N + 1>([&](auto n) FORCED { loaded[n] = *(const Loose*)(row + n * LANES); });
        repeat<K>([&](auto kx) FORCED {
            repeat<N>([&](auto n) FORCED {
                V pixels;
                if constexpr (TURNED)
                    pixels = picked<1, kx>(loaded[n], loaded[n + 1]);
                else
                    pixels = *(const Loose*)(row + kx + n * LANES);
                acc[n] += pixels * weights[ky * K + kx];
            });
        });
    });
}

// Vectors v0 to v1 of filter f, whose first tap reads from x on for the first of the plane. Without a
// call between, so that the weights stay in registers
template <int K, class T>
[[gnu::noinline]] void depthwise_filter(const Results<T>& to, const T* x, const int32_t* words, int f,
                                        int v0, int v1) {
    USE_TYPES;
    using Scalar = typename Types<T>::Scalar;
    const ImageConv<T>& a = to.conv;
    const int64_t pitch = to.phases.pitch;
    const Bounds<T> bounds(a.op);
    const bool far = to.far;
    const T* const other = a.other ? a.other + f * a.out_plane : nullptr;
    T* const out = a.out + f * a.out_plane;
    const V *const inside = to.mask, bias = splat(Scalar(a.op.bias[f]));
    V weights[K * K];
    repeat<K * K>([&](auto t) FORCED { weights[t] = broadcast<Scalar>(words + t); });
    const auto vectors = [&](auto n, int v) FORCED {
        V acc[n];
        repeat<n>([&](auto i) FORCED { acc[i] = bias; });
        depthwise_rows<K>(x + v * LANES, pitch, weights, acc);
        repeat<n>([&](auto i) FORCED {
            const int64_t at = int64_t(v + i) * LANES;
            if (far) __builtin_prefetch(out + at + n * LANES, 1);
            if (other) acc[i] += load(other + at);
            store(out + at, inside[v + i] == V{} ? V{} : bounds(acc[i]));
        });
    };
    int v = v0;
    for (; v + 4 <= v1; v += 4) vectors(Int<4>{}, v);
    for (; v < v1; ++v) vectors(Int<1>{}, v);
    for (v = v0; !bounds.enough && v < v1; ++v) {
        V value = load(out + v * LANES);
        activate<1>(a.op, f, &value);
        store(out + v * LANES, inside[v] == V{} ? V{} : value);
    }
}

// Of any kernel
template <class T>
[[gnu::noinline]] void depthwise_taps(const Results<T>& to, const typename Types<T>::Scalar* x,
                                      const int32_t* words, int f, int v0, int v1) {
    USE_TYPES;
    using Scalar = typename Types<T>::Scalar;
    using Loose = typename Types<Scalar>::Loose;
    const std::vector<int>& shift = to.phases.shift;
    const auto vectors = [&](auto n, int v) FORCED {
        V acc[n];
        repeat<n>([&](auto i) FORCED { acc[i] = splat(Scalar(to.conv.op.bias[f])); });
        for (size_t t = 0; x && t < shift.size(); ++t) {
            const V weight = broadcast<Scalar>(words + t);
            repeat<n>([&](auto i) FORCED {
                acc[i] += *(const Loose*)(x + shift[t] + (v + i) * LANES) * weight;
            });
        }
        finish<n>(to, acc, f, f + 1, v);
    };
    int v = v0;
    for (; v + 4 <= v1; v += 4) vectors(Int<4>{}, v);
    for (; v < v1; ++v) vectors(Int<1>{}, v);
}

// The size of a conv that goes row by row (below), or 0
inline int strided_kernel(const Op& op, const Tensor& in, const Tensor& out, int halo) {
    const int kernel = op.rows.kernel;
    const auto fits = [&](const Axis& axis, int size, int made) {
        return axis.kernel == kernel && axis.stride == 2 && axis.dilation == 1 &&
               axis.pad == kernel / 2 && axis.pad <= halo && made == (size - 1) / 2 + 1;
    };
    const bool all = fits(op.rows, in.height, out.height) && fits(op.columns, in.width, out.width);
    return SHUFFLES && all && (kernel == 3 || kernel == 5) ? kernel : 0;
}

// K x K of stride 2, rows `first` to `last` of filter f, as depthwise_filter has it. Of two vectors side
// by side the even pixels are what one tap needs, the odd ones what the next one does
template <int K, class T>
[[gnu::noinline]] void depthwise_strided(const ImageConv<T>& a, int f, int first, int last) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int k = a.op.start[f], width = a.made.width;
    const bool empty = k == a.op.start[f + 1];
    const int64_t pitch = a.pitch, out_pitch = a.out_pitch;
    const T* in = a.in + (empty ? 0 : a.op.index[k]) * a.in_plane - K / 2 * (pitch + 1);
    const T* const other = a.other ? a.other + f * a.out_plane : nullptr;
    T* const out = a.out + f * a.out_plane;
    const V bias = splat(T(a.op.bias[f]));
    const Bounds<T> bounds(a.op);
    V weights[K * K];
    if (!empty)
        repeat<K * K>([&](auto t) FORCED {
            weights[t] = broadcast<T>((const int32_t*)a.op.weight + int64_t(k) * K * K + t);
        });
    for (int r = first; r < last; ++r)
        for (int q = 0; q < width; q += LANES) {
            V acc = bias;  // in every_second's order
            if (!empty)
                repeat<K>([&](auto ky) FORCED {
                    const T* row = in + (2 * r + ky) * pitch + 2 * q;
                    repeat<K / 2 + 1>([&](auto j) FORCED {
                        const V one = *(const Loose*)(row + 2 * j);
                        const V two = *(const Loose*)(row + 2 * j + LANES);
                        acc += every_second<0>(one, two) * weights[ky * K + 2 * j];
                        if constexpr (2 * j + 1 < K)
                            acc += every_second<1>(one, two) * weights[ky * K + 2 * j + 1];
                    });
                });
            acc = in_order(acc);
            const int64_t at = r * out_pitch + q;
            if (other) acc += *(const Loose*)(other + at);
            store_lanes(out + at, bounds(acc), 0, width - q);
        }
    for (int r = first; !bounds.enough && r < last; ++r)
        for (int q = 0; q < width; q += LANES) {
            V value = *(const Loose*)(out + r * out_pitch + q);
            activate<1>(a.op, f, &value);
            store_lanes(out + r * out_pitch + q, value, 0, width - q);
        }
}

// Threads share the rows where there are many
template <class T>
void depthwise_strided(const ImageConv<T>& a, int kernel, int part, int parts) {
    const bool by_row = a.made.height >= 8 * parts;
    const int rows = a.made.height, filters = a.made.channels;
    const int first = by_row ? (int)split(rows, part, parts) : 0;
    const int last = by_row ? (int)split(rows, part + 1, parts) : rows;
    const int f0 = by_row ? 0 : (int)split(filters, part, parts);
    const int f1 = by_row ? filters : (int)split(filters, part + 1, parts);
    for (int f = f0; f < f1; ++f)
        kernel == 3 ? depthwise_strided<3>(a, f, first, last)
                    : depthwise_strided<5>(a, f, first, last);
}

// Scratch of one thread, in scalars
inline int64_t depthwise_scratch(const Phases& phases) {
    return phases.in_place ? 0 : phases.count * phases.plane;
}

// Threads share the plane where it is large and needs no phases, as other convs do, which leave it in
// their caches; else the channels
template <class T>
void depthwise(const ImageConv<T>& a, const Phases& phases, typename Types<T>::Scalar* scratch,
               int part, int parts) {
    USE_TYPES;
    using Scalar = typename Types<T>::Scalar;
    const Results<T> to(a, phases);
    const Op& op = a.op;
    const int taps = op.rows.kernel * op.columns.kernel, filters = a.made.channels;
    const bool by_plane = phases.in_place && phases.vectors >= 8 * parts;
    const int v0 = by_plane ? (int)split(phases.vectors, part, parts) : 0;
    const int v1 = by_plane ? (int)split(phases.vectors, part + 1, parts) : phases.vectors;
    const int f0 = by_plane ? 0 : (int)split(filters, part, parts);
    const int f1 = by_plane ? filters : (int)split(filters, part + 1, parts);
    const bool rows = phases.in_place && to.mask && op.rows.kernel == op.columns.kernel &&
                      op.rows.dilation == 1 && op.columns.dilation == 1;
    for (int f = f0; f < f1; ++f) {
        const int k = op.start[f];
        const int32_t* words = (const int32_t*)op.weight + int64_t(k) * taps;
        const Scalar* x = nullptr;
        if (k < op.start[f + 1]) {
            const T* in = a.in + op.index[k] * a.in_plane;
            if (!phases.in_place) split_phases(op, phases, a.source, in, a.pitch, scratch);
            x = phases.in_place ? (const Scalar*)in : scratch + phases.origin;
        }
        if constexpr (std::is_same_v<T, Scalar>) {
            if (x && rows && op.rows.kernel == 3) {
                depthwise_filter<3>(to, x + phases.shift[0], words, f, v0, v1);
                continue;
            }
            if (x && rows && op.rows.kernel == 5) {
                depthwise_filter<5>(to, x + phases.shift[0], words, f, v0, v1);
                continue;
            }
        }
        depthwise_taps(to, x, words, f, v0, v1);
    }
}

}  // namespace
