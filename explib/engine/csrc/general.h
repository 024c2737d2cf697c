// Convolutions of any kernel, stride, padding, dilation and groups, in both layouts. Depthwise ones
// go channel by channel.
#pragma once
#include <algorithm>
#include <vector>

#include "act.h"
#include "lanes.h"

namespace {

// ---- Blocks of images: a row of TW outputs at a time

template <class T>
struct GeneralBlock {
    const Op& op;
    const Tensor &a, &o;
    const T* in;
    const T* other;  // added to the outputs, or null
    T* out;
    int64_t plane_in, plane_out;  // in scalars
};

template <class T, int TW>
FORCED inline void finish_row(const GeneralBlock<T>& g, int f, int y, int x,
                              typename Types<T>::V (&acc)[TW]) {
    USE_TYPES;
    const int64_t first = f * g.plane_out + (int64_t(y) * g.o.width + x) * LANES;
    if (g.other) repeat<TW>([&](auto c) FORCED { 
        acc[c] += decoded<T>(load(g.other + first + c * LANES), g.op.other_code);
    });
    activate<TW>(g.op, f, acc);
    repeat<TW>([&](auto c) FORCED { 
        store(g.out + first + c * LANES, coded<T>(acc[c], g.op.out_code));
    });
}

template <class T, int TW>
FORCED inline void start_row(const Op& op, int f, typename Types<T>::V (&acc)[TW]) {
    const auto bias = splat(typename Types<T>::Scalar(op.bias[f]));
    repeat<TW>([&](auto c) FORCED { acc[c] = bias; });
}

template <class T, int TW>
void general_row(const GeneralBlock<T>& g, int f, int y, int x) {
    USE_TYPES;
    constexpr bool PAIRS = Source<T>::channels == 2;
    const Axis &rows = g.op.rows, &columns = g.op.columns;
    const int32_t* start = PAIRS ? g.op.pair_start : g.op.start;
    const int32_t* index = PAIRS ? g.op.pair_index : g.op.index;
    const int32_t* w = (const int32_t*)(PAIRS ? g.op.pair_weight : g.op.weight) +
                       int64_t(start[f]) * rows.kernel * columns.kernel;
    V acc[TW];
    start_row<T, TW>(g.op, f, acc);
    for (int k = start[f]; k < start[f + 1]; ++k) {
        const Source<T> source(g.in, index + k * Source<T>::channels, g.plane_in);
        for (int ky = 0; ky < rows.kernel; ++ky) {
            const int row = y * rows.stride - rows.pad + ky * rows.dilation;
            if (row < 0 || row >= g.a.height) {
                w += columns.kernel;
                continue;
            }
            for (int kx = 0; kx < columns.kernel; ++kx, ++w) {
                const int col = x * columns.stride - columns.pad + kx * columns.dilation;
                const auto from = source.from((int64_t(row) * g.a.width + col) * LANES);
                const auto pixel = [&](const Source<T>& from, int c) FORCED {
                    return decoded<T>(from[c * columns.stride * LANES], g.op.in_code);
                };
                if (col >= 0 && col + (TW - 1) * columns.stride < g.a.width)
                    repeat<TW>([&](auto c) FORCED {
                        acc[c] = add_product<T>(acc[c], pixel(from, c), w);
                    });
                else
                    repeat<TW>([&](auto c) FORCED {
                        const int at = col + c * columns.stride;
                        if (at >= 0 && at < g.a.width)
                            acc[c] = add_product<T>(acc[c], pixel(from, c), w);
                    });
            }
        }
    }
    finish_row<T, TW>(g, f, y, x, acc);
}

// Of a filter with one channel: each pixel is loaded once a row of the kernel
template <class T, int K, int S, int TW>
void depthwise_row(const GeneralBlock<T>& g, int f, int y, int x) {
    USE_TYPES;
    using Scalar = typename Types<T>::Scalar;
    constexpr int IW = (TW - 1) * S + K;
    V acc[TW];
    start_row<T, TW>(g.op, f, acc);
    for (int k = g.op.start[f]; k < g.op.start[f + 1]; ++k) {
        const T* plane = g.in + g.op.index[k] * g.plane_in;
        const int top = y * S - g.op.rows.pad, left = x * S - g.op.columns.pad;
        for (int ky = std::max(0, -top); ky < std::min(K, g.a.height - top); ++ky) {
            V weights[K];
            repeat<K>([&](auto kx) FORCED {
                weights[kx] = broadcast<Scalar>((const int32_t*)g.op.weight + (int64_t(k) * K + ky) * K + kx);
            });
            const T* row = plane + (int64_t(top + ky) * g.a.width + left) * LANES;
            const auto add = [&](auto inside) FORCED {
                repeat<IW>([&](auto j) FORCED {
                    if (!inside && (left + j < 0 || left + j >= g.a.width)) return;
                    const V pixel = decoded<T>(load(row + j * LANES), g.op.in_code);
                    repeat<K>([&](auto kx) FORCED {
                        constexpr int dx = j - kx;
                        if constexpr (dx >= 0 && dx % S == 0 && dx / S < TW)
                            acc[dx / S] += pixel * weights[kx];
                    });
                });
            };
            if (left >= 0 && left + IW <= g.a.width)
                add(std::true_type{});
            else
                add(std::false_type{});
        }
    }
    finish_row<T, TW>(g, f, y, x, acc);
}

// A row of outputs as pieces of 8, 4, 2 and 1
template <class Body>
FORCED inline void pieces(int width, Body&& body) {
    int x = 0;
    for (; x + 8 <= width; x += 8) body(std::integral_constant<int, 8>{}, x);
    if (width & 4) body(std::integral_constant<int, 4>{}, x), x += 4;
    if (width & 2) body(std::integral_constant<int, 2>{}, x), x += 2;
    if (width & 1) body(std::integral_constant<int, 1>{}, x);
}

template <class T, int K, int S>
void depthwise_plane(const GeneralBlock<T>& g, int f) {
    for (int y = 0; y < g.o.height; ++y)
        pieces(g.o.width, [&](auto tw, int x) { depthwise_row<T, K, S, tw>(g, f, y, x); });
}

template <class T>
void depthwise_block(const GeneralBlock<T>& g, int part, int parts) {
    const Axis &rows = g.op.rows, &columns = g.op.columns;
    const bool square = rows.kernel == columns.kernel && rows.stride == columns.stride &&
                        rows.dilation == 1 && columns.dilation == 1;
    const int kind = square ? rows.kernel * 10 + rows.stride : 0;
    const int last = (int)split(g.o.channels, part + 1, parts);
    for (int f = (int)split(g.o.channels, part, parts); f < last; ++f) switch (kind) {
            case 31: depthwise_plane<T, 3, 1>(g, f); break;
            case 32: depthwise_plane<T, 3, 2>(g, f); break;
            case 51: depthwise_plane<T, 5, 1>(g, f); break;
            case 52: depthwise_plane<T, 5, 2>(g, f); break;
            default:
                for (int y = 0; y < g.o.height; ++y)
                    pieces(g.o.width, [&](auto tw, int x) { general_row<T, tw>(g, f, y, x); });
        }
}

// Threads share the rows where there are many, else the filters
template <class T>
void general_block(const GeneralBlock<T>& g, int part, int parts) {
    if (is_depthwise(g.op, g.a)) return depthwise_block(g, part, parts);
    const bool by_row = g.o.height >= 4 * parts;
    const int first = by_row ? (int)split(g.o.height, part, parts) : 0;
    const int last = by_row ? (int)split(g.o.height, part + 1, parts) : g.o.height;
    const bool by_filter = parts > 1 && !by_row;
    const int from = by_filter ? g.op.share[part] : 0;
    const int to = by_filter ? g.op.share[part + 1] : g.o.channels;
    for (int y = first; y < last; ++y)
        pieces(g.o.width, [&](auto tw, int x) {
            for (int f = from; f < to; ++f) general_row<T, tw>(g, f, y, x);
        });
}

// ---- Single images: a conv as one of stride 1 on flat planes, one for each phase of the strides

// Along one axis: the phases' offsets of the kernel's taps, and the pixels that they need
struct Reach {
    int low, high;  // the first and last offset
    int size;       // of the pixels of a phase, from 0 on
    int before, after;  // zeros around them
    Reach(const Axis& axis, int in, int out) {
        low = floor_div(-axis.pad, axis.stride);
        high = floor_div((axis.kernel - 1) * axis.dilation - axis.pad, axis.stride);
        size = std::max(0, std::min((in + axis.stride - 1) / axis.stride, out + high));
        before = std::max(0, -low);
        after = std::max(0, out + high - size);
    }
    static int floor_div(int a, int by) { return a >= 0 ? a / by : -((by - 1 - a) / by); }
};

// Where outputs side by side go in another plane
struct Piece {
    int from, count;
    int64_t to;
};

// Rows of zeros, then of pixels, with zeros between them that serve the end of one and the start of
// the next: what a tap needs for neighbouring outputs lies side by side, across the rows' ends, too
struct Phases {
    int count, pitch;
    int64_t origin = 0, plane = 0;  // in pixels: of the first in a plane; a plane's size
    int vectors;                    // of outputs, laid as the planes are
    bool in_place;
    std::vector<int> shift;  // of the taps
    Reach down, along;
    // wide: 0, or the pitch of the input's own planes, where they serve as they are; wide_out: that
    // of the output, which is taken where it is wide enough
    Phases(const Op& op, const Tensor& in, const Tensor& out, int lanes, int wide, int wide_out)
        : count(op.rows.stride * op.columns.stride),
          in_place(wide > 0),
          down(op.rows, in.height, out.height),
          along(op.columns, in.width, out.width) {
        pitch = wide ? wide
                     : std::max({out.width, along.size + std::max(along.before, along.after),
                                 wide_out});
        vectors = round_up((out.height - 1) * pitch + out.width, lanes) / lanes;
        if (!wide) {
            origin = round_up(down.before * pitch + along.before, lanes);
            // beyond the last row what vectors read that reach beyond it
            const int64_t end = int64_t(down.size + down.after) * pitch + along.after;
            plane = round_up(int(origin + end), lanes) + 8 * lanes;
        }
        const Axis &rows = op.rows, &columns = op.columns;
        for (int t = 0; t < rows.kernel * columns.kernel; ++t) {
            const int y = t / columns.kernel * rows.dilation - rows.pad;
            const int x = t % columns.kernel * columns.dilation - columns.pad;
            const int ky = Reach::floor_div(y, rows.stride), kx = Reach::floor_div(x, columns.stride);
            const int phase = (y - ky * rows.stride) * columns.stride + x - kx * columns.stride;
            shift.push_back(int(phase * plane) + ky * pitch + kx);
        }
    }

    // Where `size` outputs from `first` on go in a plane with another pitch; how many pieces
    int pieces(const Tensor& out, int wide_out, int first, int size, Piece* made) const {
        int found = 0;
        for (int p = first; p < first + size;) {
            const int row = p / pitch, column = p % pitch;
            const int n = std::min(pitch - column, first + size - p);
            if (row < out.height && column < out.width)
                made[found++] = {p - first, std::min(n, out.width - column),
                                 int64_t(row) * wide_out + column};
            p += n;
        }
        return found;
    }
};

// The pixels of a plane as phases, from `out` on; of int8 what its codes stand for. What is written
// beyond a row the next one or the end overwrites
template <class T>
void split_phases(const Op& op, const Phases& phases, const Tensor& a, const T* in, int wide,
                  typename Types<T>::Scalar* out) {
    using S = typename Types<T>::Scalar;
    using Loose = typename Types<S>::Loose;
    const int down = op.rows.stride, along = op.columns.stride;
    const auto count = [&](int left) {  // pixels of a row in the phases of this column
        return std::clamp((a.width - left + along - 1) / along, 0, phases.along.size);
    };
    const int even = count(0), odd = count(1);
    for (int top = 0; top < down; ++top) {
        S* phase = out + top * along * phases.plane;
        for (int left = 0; left < along; ++left)
            std::fill_n(phase + left * phases.plane, phases.origin, S(0));
        S* row = phase + phases.origin;
        for (int r = 0; r < phases.down.size; ++r, row += phases.pitch) {
            const int y = r * down + top;
            const bool live = y < a.height;
            const T* x = in + int64_t(y) * wide;
            const auto end = [&](S* row, int pixels) FORCED {
                for (int q = live ? pixels : 0; q < phases.pitch; q += Types<S>::lanes)
                    *(Loose*)(row + q) = Loose{};
            };
            if (std::is_same_v<T, S> && along == 2) {
                if (live) deinterleave((const S*)x, 2 * even, row, row + phases.plane);
                end(row, even), end(row + phases.plane, odd);
                continue;
            }
            for (int left = 0; left < along; ++left) {
                S* to = row + left * phases.plane;
                const int pixels = along == 1 ? even : count(left);
                for (int q = 0; live && q < pixels; ++q)
                    to[q] = decoded<T>(S(x[left + q * along]), op.in_code);
                end(to, pixels);
            }
        }
        for (int left = 0; left < along; ++left)
            std::fill(row + left * phases.plane, phase + (left + 1) * phases.plane, S(0));
    }
}

}  // namespace
