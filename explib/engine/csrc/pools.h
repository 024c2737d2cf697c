// Pools, in both layouts: windows by the op's lists, first and end of each row, then each column.
#pragma once
#include <algorithm>

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

// What becomes of the pixels of each window: first over rows, whole rows at a time, then over as
// many neighbours as the widest windows have. down, along: from one of them to the next. row: room
// for two, each a vector longer
template <class P, class R, class Get, class Join, class Put>
void join_windows(const Op& op, int pitch_in, int pitch_out, const Tensor& a, const Tensor& o,
                  const P* in, P* __restrict out, R* __restrict row, int down, int along,
                  const Get& get, const Join& join, const Put& put) {
    const int width = a.width, width_out = o.width;  // copies, which what is written cannot be
    const int32_t *rows = op.index, *columns = rows + 2 * o.height;
    constexpr bool VECTORS = std::is_same_v<P, R> && !std::is_integral_v<P>;
    R* joined = row + (VECTORS ? 2 : 1) * round_up(pitch_in, Types<P>::lanes);
    int full = 0;
    for (int q = 0; q < width_out; ++q)
        full = std::max(full, columns[2 * q + 1] - columns[2 * q]);
    // the outputs whose windows are whole and as far apart, at steps that vectors can take
    int first = 0, last = 0, step = 0;
    while (first < width_out && columns[2 * first + 1] - columns[2 * first] < full) ++first;
    if (first + 1 < width_out) step = columns[2 * first + 2] - columns[2 * first];
    if (step == 1 || step == 2)
        for (last = first; last < width_out; ++last)
            if (columns[2 * last + 1] - columns[2 * last] < full ||
                columns[2 * last] - columns[2 * first] != (last - first) * step)
                break;
    last = std::max(first, last);
    for (int r = 0, height = o.height; r < height; ++r, out += pitch_out) {
        const P* x = in + rows[2 * r] * pitch_in;
        const P* end = in + rows[2 * r + 1] * pitch_in;
        if constexpr (VECTORS) {
            using Loose = typename Types<P>::Loose;
            for (int q = 0; q < width; q += Types<P>::lanes) {
                typename Types<P>::V most = *(const Loose*)(x + q);
                for (const P* next = x + down * pitch_in; next < end; next += down * pitch_in)
                    most = join(most, *(const Loose*)(next + q));
                *(Loose*)(row + q) = most;
            }
            for (int q = 0; q <= width - full; q += Types<P>::lanes) {
                typename Types<P>::V most = *(const Loose*)(row + q);
                for (int d = along; d < full; d += along)
                    most = join(most, *(const Loose*)(row + q + d));
                *(Loose*)(joined + q) = most;
            }
        } else {
            for (int q = 0; q < width; ++q) row[q] = get(x[q]);
            for (x += down * pitch_in; x < end; x += down * pitch_in)
                for (int q = 0; q < width; ++q) row[q] = join(row[q], get(x[q]));
            std::copy_n(row, width + 1 - full, joined);
            for (int d = along; d < full; d += along)
                for (int q = 0; q <= width - full; ++q) joined[q] = join(joined[q], row[q + d]);
        }
        const auto one = [&](int q) FORCED {
            const int from = columns[2 * q], to = columns[2 * q + 1];
            R value = to - from == full ? joined[from] : row[from];
            for (int c = from + along; c < to && to - from < full; c += along)
                value = join(value, row[c]);
            out[q] = P(put(value, r, q));
        };
        const auto even = [&](auto step) FORCED {
            for (int q = first; q < last; ++q)
                out[q] = P(put(joined[columns[2 * first] + (q - first) * step], r, q));
        };
        for (int q = 0; q < first; ++q) one(q);
        if (step == 1) even(std::integral_constant<int, 1>{});
        if (step == 2) even(std::integral_constant<int, 2>{});
        for (int q = last; q < width_out; ++q) one(q);
    }
}

// A plane of one image. pixels: of a whole plane, with zeros where those are the layout's; scratch:
// two rows of floats
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
    const auto kept = [](auto value, int, int) FORCED { return value; };
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
