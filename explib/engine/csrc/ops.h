// What both layouts do alike: ops on vectors of a plane, and ops that choose pixels.
#pragma once
#include <algorithm>
#include <cmath>

#include "act.h"

namespace {

constexpr int CHUNK = 8;  // vectors that go through an op at once

// Two operands or one, pixel by pixel. z: the second one's plane, or null where it is `point`
// everywhere. mask: null, or what lies outside of the image, which stays zero.
template <class T>
void elementwise(const Op& op, int c, const T* x, const T* z, typename Types<T>::V point, T* y,
                 const typename Types<T>::V* mask, int64_t vectors) {
    USE_TYPES;
    using Scalar = typename Types<T>::Scalar;
    for (int64_t first = 0; first < vectors; first += CHUNK) {
        const int count = (int)std::min<int64_t>(CHUNK, vectors - first);
        V values[CHUNK] = {};
        const auto each = [&](auto f) FORCED {
            for (int i = 0; i < count; ++i) {
                const int64_t at = (first + i) * LANES;
                values[i] = f(decoded<T>(load(x + at), op.in_code),
                              z ? decoded<T>(load(z + at), op.other_code) : point);
            }
        };
        switch (op.kind) {
            case ADD: each([](V a, V b) FORCED { return a + b; }); break;
            case SUB: each([](V a, V b) FORCED { return a - b; }); break;
            case MUL: each([](V a, V b) FORCED { return a * b; }); break;
            case DIV: each([](V a, V b) FORCED { return a / b; }); break;
            case MAXIMUM: each([](V a, V b) FORCED { return larger(a, b); }); break;
            case AFFINE: {
                const Scalar scale(((const float*)op.weight)[c]), shift(op.bias[c]);
                each([=](V a, V) FORCED { return a * scale + shift; });
                break;
            }
            case SCALAR: {
                const Scalar scale(op.alpha), shift(op.beta);
                each([=](V a, V) FORCED { return a * scale + shift; });
                break;
            }
            default: each([](V a, V) FORCED { return a; });
        }
        activate<CHUNK>(op, c, values);
        for (int i = 0; i < count; ++i) {
            if (mask) values[i] = mask[first + i] == V{} ? V{} : values[i];
            store(y + (first + i) * LANES, coded<T>(values[i], op.out_code));
        }
    }
}

// Over the channels of each pixel, for vectors `first` to `last` of the planes
template <class T>
void layernorm(const Op& op, const T* in, T* out, int64_t plane, int channels,
               const typename Types<T>::V* mask, int64_t first, int64_t last) {
    USE_TYPES;
    using Wide = decltype(widened(V{}));
    const float* weight = (const float*)op.weight;
    for (; first < last; first += CHUNK) {
        const int count = (int)std::min<int64_t>(CHUNK, last - first);
        Wide mean[CHUNK] = {}, scale[CHUNK] = {};
        const auto each = [&](auto f) FORCED {
            for (int c = 0; c < channels; ++c)
                for (int i = 0; i < count; ++i) {
                    const V pixel = load(in + c * plane + (first + i) * LANES);
                    f(c, i, widened(decoded<T>(pixel, op.in_code)));
                }
        };
        each([&](int, int i, Wide x) FORCED { mean[i] += x; });
        for (int i = 0; i < count; ++i) mean[i] = mean[i] / float(channels);
        each([&](int, int i, Wide x) FORCED { scale[i] += (x - mean[i]) * (x - mean[i]); });
        for (int i = 0; i < count; ++i)
            for (unsigned lane = 0; lane < sizeof(Wide) / sizeof(float); ++lane)
                scale[i][lane] = 1 / std::sqrt(scale[i][lane] / float(channels) + op.alpha);
        each([&](int c, int i, Wide x) FORCED {
            V value = narrowed<V>((x - mean[i]) * scale[i] * weight[c] + op.bias[c]);
            if (mask) value = mask[first + i] == V{} ? V{} : value;
            store(out + c * plane + (first + i) * LANES, coded<T>(value, op.out_code));
        });
    }
}

// The sum of a whole plane, zeros between its rows included, lane by lane
template <class T>
auto plane_sum(const T* x, int64_t vectors) {
    USE_TYPES;
    using Wide = decltype(widened(V{}));
    Wide sums[4] = {};
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4)
        repeat<4>([&](auto i) FORCED { sums[i] += widened(load(x + (v + i) * LANES)); });
    for (; v < vectors; ++v) sums[0] += widened(load(x + v * LANES));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// How a layout has its pixels: the rows' distance in pixels, the planes' in scalars, and a pixel
template <class T>
struct BlockPixels {
    using Pixel = typename Types<T>::V;
    static constexpr int SIZE = Types<T>::lanes;  // in scalars
    int pitch_in, pitch_out;
    static FORCED Pixel get(const T* plane, int64_t at) { return load(plane + at * SIZE); }
    static FORCED void set(T* plane, int64_t at, Pixel value) { store(plane + at * SIZE, value); }
    static FORCED Pixel all(typename Types<T>::Scalar value) { return Pixel{} + value; }
};
template <class T>
struct ImagePixels {
    using Pixel = T;
    static constexpr int SIZE = 1;
    int pitch_in, pitch_out;
    static FORCED Pixel get(const T* plane, int64_t at) { return plane[at]; }
    static FORCED void set(T* plane, int64_t at, Pixel value) { plane[at] = value; }
    static FORCED Pixel all(typename Types<T>::Scalar value) { return Pixel(value); }
};

// Over each group of channels with all their pixels; threads share the groups
template <class T, class Layout>
void groupnorm(const Op& op, const Layout& layout, const Tensor& a, const T* in, T* out,
               int64_t from, int64_t to, int part, int parts) {
    using Pixel = typename Layout::Pixel;
    using Wide = decltype(widened(Pixel{}));
    const int size = a.channels / op.groups, last = (int)split(op.groups, part + 1, parts);
    const float* weight = (const float*)op.weight;
    for (int g = (int)split(op.groups, part, parts); g < last; ++g) {
        const auto mean_of = [&](auto f) FORCED {  // row by row, so that long sums stay exact
            Wide total = {};
            for (int c = g * size; c < (g + 1) * size; ++c)
                for (int r = 0; r < a.height; ++r) {
                    Wide row = {};
                    for (int q = 0; q < a.width; ++q) {
                        const int64_t at = int64_t(r) * layout.pitch_in + q;
                        row += f(decoded<T>(widened(layout.get(in + c * from, at)), op.in_code));
                    }
                    total += row;
                }
            return total / (float(size) * a.height * a.width);
        };
        const Wide mean = mean_of([](Wide x) FORCED { return x; });
        Wide scale = mean_of([=](Wide x) FORCED { return (x - mean) * (x - mean); });
        if constexpr (sizeof(Wide) == sizeof(float))
            scale = 1 / std::sqrt(scale + op.alpha);
        else
            for (unsigned lane = 0; lane < sizeof(Wide) / sizeof(float); ++lane)
                scale[lane] = 1 / std::sqrt(scale[lane] + op.alpha);
        for (int c = g * size; c < (g + 1) * size; ++c)
            for (int r = 0; r < a.height; ++r)
                for (int q = 0; q < a.width; ++q) {
                    const Wide x = decoded<T>(
                        widened(layout.get(in + c * from, int64_t(r) * layout.pitch_in + q)),
                        op.in_code);
                    const Wide value = (x - mean) * scale * weight[c] + op.bias[c];
                    layout.set(out + c * to, int64_t(r) * layout.pitch_out + q,
                               narrowed<Pixel>(coded<T>(value, op.out_code)));
                }
    }
}

inline bool is_whole(const Op& op, const Tensor& in, const Tensor& out) {
    return out.height * out.width == 1 && op.index[0] == 0 && op.index[1] == in.height &&
           op.index[2] == 0 && op.index[3] == in.width;
}

// Rows and columns of one channel by the op's lists; x: null where the channel is outside
template <class T, class Layout>
void select_plane(const Op& op, const Layout& layout, const Tensor& out, const T* x, T* y) {
    const int32_t *rows = op.index + out.channels, *columns = rows + out.height;
    const auto outside = Layout::all(typename Types<T>::Scalar(coded<T>(op.alpha, op.out_code)));
    // lists rise: so do neighbours only where the last is as far from the first as it is here
    const bool neighbours = columns[0] >= 0 && columns[out.width - 1] - columns[0] == out.width - 1;
    for (int r = 0; r < out.height; ++r) {
        const int64_t to = int64_t(r) * layout.pitch_out;
        if (!x || rows[r] < 0) {
            for (int q = 0; q < out.width; ++q) layout.set(y, to + q, outside);
            continue;
        }
        const int64_t from = int64_t(rows[r]) * layout.pitch_in;
        if (neighbours)
            std::copy_n(x + (from + columns[0]) * Layout::SIZE, out.width * Layout::SIZE,
                        y + to * Layout::SIZE);
        else
            for (int q = 0; q < out.width; ++q)
                layout.set(y, to + q, columns[q] < 0 ? outside : layout.get(x, from + columns[q]));
    }
}

template <class T, class Layout>
void bilinear_plane(const Op& op, const Layout& layout, const Tensor& in, const Tensor& out,
                    const T* x, T* y) {
    using Pixel = typename Layout::Pixel;
    const int32_t *rows = op.index, *columns = rows + out.height;
    for (int r = 0; r < out.height; ++r) {
        const int64_t one = int64_t(rows[r]) * layout.pitch_in;
        const int64_t two = int64_t(std::min(rows[r] + 1, in.height - 1)) * layout.pitch_in;
        const float down = op.bias[r];
        for (int q = 0; q < out.width; ++q) {
            const int left = columns[q], right = std::min(left + 1, in.width - 1);
            const float along = op.bias[out.height + q];
            const auto mixed = [&](int64_t row) FORCED {
                return widened(layout.get(x, row + left)) * (1 - along) +
                       widened(layout.get(x, row + right)) * along;
            };
            layout.set(y, int64_t(r) * layout.pitch_out + q,
                       narrowed<Pixel>(mixed(one) * (1 - down) + mixed(two) * down));
        }
    }
}

}  // namespace
