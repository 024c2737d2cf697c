// Pools, in both layouts: windows by the op's lists, first and end of each row, then each column.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "ops.h"

namespace {

// A plane of a block of images
template <class T>
void pool_block(const Op& op, const Tensor& a, const Tensor& o, const T* x, T* y) {
    USE_TYPES;
    using Wide = decltype(widened(V{}));
    const int32_t *rows = op.index, *columns = rows + 2 * o.height;
    if (op.kind == AVGPOOL && is_whole(op, a, o)) {
        // of int8: what zero stands for, as often as it is in the sum
        const Code code{op.in_code.scale, op.in_code.zero * a.height * a.width};
        const Wide sum = decoded<T>(plane_sum(x, a.height * a.width), code);
        return store(y, narrowed<V>(coded<T>(sum * op.bias[0] * op.bias[1], op.out_code)));
    }
    for (int r = 0; r < o.height; ++r)
        for (int q = 0; q < o.width; ++q, y += LANES) {
            const int r0 = rows[2 * r], r1 = rows[2 * r + 1];
            const int c0 = columns[2 * q], c1 = columns[2 * q + 1];
            if (op.kind == MAXPOOL) {
                V most = load(x + (r0 * a.width + c0) * LANES);
                for (int i = r0; i < r1; i += op.rows.dilation)
                    for (int j = c0; j < c1; j += op.columns.dilation)
                        most = larger(most, load(x + (i * a.width + j) * LANES));
                store(y, most);
            } else {
                Wide sum = {};
                for (int i = r0; i < r1; ++i)
                    for (int j = c0; j < c1; ++j) {
                        const V pixel = load(x + (i * a.width + j) * LANES);
                        sum += widened(decoded<T>(pixel, op.in_code));
                    }
                sum = sum * op.bias[r] * op.bias[o.height + q];
                store(y, narrowed<V>(coded<T>(sum, op.out_code)));
            }
        }
}

// Scalars of a row as it is joined, and more that vectors reach
template <class R>
int joined_row(int pitch) {
    return round_up(pitch, Types<R>::lanes) + Types<R>::lanes;
}

// What a pool of single images needs of scratch memory, in values of S: three rows of any type
template <class S>
int64_t pool_scratch(int pitch) {
    return 3 * joined_row<float>(pitch) * int64_t(sizeof(float) / sizeof(S));
}

struct Kept {  // a maximum
    template <class R>
    FORCED R operator()(R value, int, int) const {
        return value;
    }
};

// What becomes of the pixels of each window: first over rows, whole rows at a time, then over as
// many neighbours as the widest windows have. down, along: from one of them to the next. row: room
// for three
template <class P, class R, class Get, class Join, class Put>
void join_windows(const Op& op, int pitch_in, int pitch_out, const Tensor& a, const Tensor& o,
                  const P* in, P* __restrict out, R* __restrict row, int down, int along,
                  const Get& get, const Join& join, const Put& put) {
    constexpr int LANES = Types<R>::lanes;
    using V = typename Types<R>::V;
    using Loose = typename Types<R>::Loose;
    const int width = a.width, width_out = o.width;  // copies, which what is written cannot be
    const int32_t *rows = op.index, *columns = rows + 2 * o.height;
    const auto begin = [&](int q) { return columns[2 * q]; };
    const auto size = [&](int q) { return columns[2 * q + 1] - columns[2 * q]; };
    int full = 0;
    for (int q = 0; q < width_out; ++q) full = std::max(full, size(q));
    // the outputs whose windows are whole and as far apart, at steps that vectors can take
    int first = 0, last = 0, step = 0;
    while (first < width_out && size(first) < full) ++first;
    if (first + 1 < width_out) step = begin(first + 1) - begin(first);
    if (step == 1 || step == 2)
        for (last = first; last < width_out; ++last)
            if (size(last) < full || begin(last) - begin(first) != (last - first) * step) break;
    const int whole = std::max(0, last - first);
    const int base = whole ? begin(first) : 0;
    R *even = row + joined_row<R>(pitch_in), *odd = even + joined_row<R>(pitch_in);
    // few pixels each: without memory between rows and columns, which would wait for what it holds
    const bool few = full >= 2 && full <= 4 && along == 1;
    const bool direct = SHUFFLES && std::is_same_v<P, R> && step == 2 && few;
    for (int r = 0, height = o.height; r < height; ++r, out += pitch_out) {
        const P* x = in + rows[2 * r] * pitch_in;
        const P* end = in + rows[2 * r + 1] * pitch_in;
        const auto column = [&](int q) FORCED {
            R value = get(x[q]);
            for (const P* next = x + down * pitch_in; next < end; next += down * pitch_in)
                value = join(value, get(next[q]));
            return value;
        };
        const auto store_loosely = [](R* to, V value) FORCED { *(Loose*)to = value; };
        const auto made = [&](int q, V value) FORCED {  // of the whole windows from the qth on
            if constexpr (std::is_same_v<Put, Kept>)
                store_lanes(out + first + q, value, 0, std::min(LANES, whole - q));
            else
                for (int i = 0; i < std::min(LANES, whole - q); ++i)
                    out[first + q + i] = P(put(value[i], r, first + q + i));
        };
        if constexpr (std::is_same_v<P, R>) {
            const auto columns = [&](int q) FORCED {
                V value = *(const Loose*)(x + q);
                for (const P* next = x + down * pitch_in; next < end; next += down * pitch_in)
                    value = join(value, *(const Loose*)(next + q));
                return value;
            };
            V evens[2], odds[2];  // those of a vector of windows, and of the next one
            for (int q = -LANES; direct && q < whole; q += LANES) {
                const int next = base + 2 * (q + LANES);
                const V a = columns(next), b = columns(next + LANES);
                evens[1] = picked<2, 0>(a, b), odds[1] = picked<2, 1>(a, b);
                if (q >= 0) {
                    V value = join(evens[0], odds[0]);
                    if (full > 2) value = join(value, picked<1, 1>(evens[0], evens[1]));
                    if (full > 3) value = join(value, picked<1, 1>(odds[0], odds[1]));
                    made(q, value);
                }
                evens[0] = evens[1], odds[0] = odds[1];
            }
            for (int q = 0; !direct && q < width; q += LANES) store_loosely(row + q, columns(q));
        } else {
            for (int q = 0; q < width; ++q) row[q] = column(q);
        }
        // of two rows by turns, where windows are two pixels apart
        const R* near[2] = {row + base, row + base + 1};
        if (!direct && whole && step == 2) {
            deinterleave(near[0], 2 * (whole - 1) + full, even, odd);
            near[0] = even, near[1] = odd;
        }
        for (int q = 0; !direct && q < whole; q += LANES) {
            V value = *(const Loose*)(near[0] + q);
            for (int d = along; d < full; d += along) {
                const R* next = step == 2 ? near[d % 2] + d / 2 : near[0] + d;
                value = join(value, *(const Loose*)(next + q));
            }
            made(q, value);
        }
        const auto one = [&](int q) FORCED {
            const auto at = [&](int c) FORCED { return direct ? column(c) : row[c]; };
            R value = at(begin(q));
            for (int c = begin(q) + along; c < begin(q) + size(q); c += along)
                value = join(value, at(c));
            out[q] = P(put(value, r, q));
        };
        for (int q = 0; q < first; ++q) one(q);
        for (int q = first + whole; q < width_out; ++q) one(q);
    }
}

// A plane of one image. pixels: of a whole plane, with zeros where those are the layout's; scratch:
// pool_scratch
template <class T>
void pool_image(const Op& op, const ImagePixels<T>& layout, const Tensor& a, const Tensor& o,
                const T* in, T* out, int64_t pixels, void* scratch) {
    constexpr int LANES = Types<T>::lanes;
    if (op.kind == AVGPOOL && is_whole(op, a, o)) {
        const auto lanes = plane_sum(in, pixels / LANES);
        float sum = 0;
        for (int i = 0; i < LANES; ++i) sum += lanes[i];
        for (int64_t i = pixels / LANES * LANES; i < pixels; ++i) sum += float(in[i]);
        sum = decoded<T>(sum, Code{op.in_code.scale, op.in_code.zero * pixels});
        out[0] = T(coded<T>(sum * op.bias[0] * op.bias[1], op.out_code));
        return;
    }
    const int wide = layout.pitch_in, wide_out = layout.pitch_out;
    const int down = op.rows.dilation, along = op.columns.dilation;
    const auto same = [](auto x) FORCED { return x; };
    const auto most = [](auto a, auto b) FORCED { return larger(a, b); };
    const Kept kept;
    if (op.kind == AVGPOOL)
        join_windows(op, wide, wide_out, a, o, in, out, (float*)scratch, 1, 1,
                     [&](T x) FORCED { return decoded<T>(float(x), op.in_code); },
                     [](auto a, auto b) FORCED { return a + b; },
                     [&](float sum, int r, int q) FORCED {
                         return coded<T>(sum * op.bias[r] * op.bias[o.height + q], op.out_code);
                     });
    else if constexpr (std::is_same_v<T, Byte>)
        join_windows(op, wide, wide_out, a, o, (const uint8_t*)in, (uint8_t*)out,
                     (uint8_t*)scratch, down, along, same, most, kept);
    else
        join_windows(op, wide, wide_out, a, o, in, out, (T*)scratch, down, along, same, most, kept);
}

}  // namespace
