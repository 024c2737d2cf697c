// int8: depthwise convolutions of single images, a channel at a time: its plane is copied beside the
// code of zero on every side, so that each word (bytes.h) is a load and a shuffle, in registers only.
#pragma once
#include <algorithm>
#include <cstring>

#include "byte_images.h"
#include "planes.h"

namespace {

constexpr int BAND_BYTES = 16 * 1024;  // copied at once, of the nearest cache

// Copies that cost no call, of the last bytes once more
FORCED inline void copy_codes(Byte* to, const Byte* from, int count) {
    const auto by = [&](auto size) FORCED {
        for (int i = 0; i < count - size; i += size) std::memcpy(to + i, from + i, size);
        std::memcpy(to + count - size, from + count - size, size);
    };
    if (count >= 16) return by(Int<16>{});
    if (count >= 8) return by(Int<8>{});
    if (count >= 4) return by(Int<4>{});
    for (int i = 0; i < count; ++i) to[i] = from[i];
}

// TH rows of outputs of filter f, BYTE_LANES of each, from (y, x) on, whose first code is at `codes`
template <int K, int S, int TH>
FORCED inline void byte_depthwise_tile(const ImageConv<Byte>& a, int f, int y, int x,
                                       const Byte* codes, int64_t pitch, const int32_t* weight) {
    constexpr int Q = (K + 3) / 4;
    Words sums[TH] = {};
    if (weight) {
        Words weights[K][Q];
        repeat<K * Q>([&](auto i) FORCED { weights[i / Q][i % Q] = Words{} + weight[i]; });
        repeat<(TH - 1) * S + K>([&](auto i) FORCED {
            repeat<Q>([&](auto q) FORCED {
                const Words near = neighbours<S>(codes + i * pitch + q * 4);
                repeat<K>([&](auto ky) FORCED {
                    constexpr int dy = i - ky;
                    if constexpr (dy >= 0 && dy % S == 0 && dy / S < TH)
                        sums[dy / S] = add_dots(sums[dy / S], near, weights[ky][q]);
                });
            });
        });
    }
    const int64_t width = a.made.width, first = f * a.out_plane + y * width + x;
    const int live = int(width) - x;
    const bool beyond = !a.other;
    end_sums<TH>(
        a.op, f, sums, a.other, [&](int i) FORCED { return first + i * width; },
        [&](int i, Types<float>::V made) FORCED {
            Byte* const at = a.out + first + i * width;
            if (live >= BYTE_LANES || (beyond && i + 1 < TH)) return store(at, made);
            store_some(at, made, live);
        });
}

// How planes are copied: so many rows at once, for a band of rows of outputs
struct Padded {
    int pitch, rows, band;
    Padded(const Op& op, const Tensor& in) {
        const int kernel = op.rows.kernel, stride = op.rows.stride;
        pitch = round_up(in.width + kernel - 1, 16);
        band = std::max(((BAND_BYTES / pitch - kernel) / stride + 1) / 7 * 7, 7);
        rows = (band - 1) * stride + kernel;
    }
    int64_t bytes() const { return round_up(rows * pitch + NEAR, 64); }
    // of one thread: what is copied next waits until what it is stored by is done
    int64_t scratch() const { return 2 * bytes(); }
};

// What rows `from` to `to` of the outputs of filter f are made of
inline void copy_band(const ImageConv<Byte>& a, int f, int from, int to, const Padded& padded,
                      Byte* copy) {
    const int K = a.op.rows.kernel, S = a.op.rows.stride, width = a.source.width;
    const Byte* plane = a.in + int64_t(f) * a.source.channels / a.made.channels * a.in_plane;
    for (int i = 0; i < (to - from - 1) * S + K; ++i) {
        const int row = from * S - K / 2 + i;
        Byte* at = copy + int64_t(i) * padded.pitch + K / 2;
        if (row >= 0 && row < a.source.height)
            copy_codes(at, plane + int64_t(row) * width, width);
        else if (padded.band < a.made.height)  // else it is as it was
            std::memset(at, int(a.op.in_code.zero), width);
    }
}

// These outputs. Columns from right to left and rows downwards: what is stored beyond the end of a
// row is overwritten by the next one, unless something is added there
template <int K, int S>
[[gnu::noinline]] void byte_depthwise_band(const ImageConv<Byte>& a, int f, int from, int to,
                                           const Padded& padded, const Byte* copy) {
    constexpr int TH = 7;
    const int k = a.op.flat_start[f];
    const bool empty = k == a.op.flat_start[f + 1];
    const int32_t* weight = (const int32_t*)a.op.flat_weight + int64_t(k) * K * ((K + 3) / 4);
    for (int x = (a.made.width - 1) / BYTE_LANES * BYTE_LANES; x >= 0; x -= BYTE_LANES) {
        const auto tile = [&](auto th, int y) FORCED {
            byte_depthwise_tile<K, S, th>(a, f, y, x,
                                          copy + int64_t(y - from) * S * padded.pitch + x * S,
                                          padded.pitch, empty ? nullptr : weight);
        };
        int y = from;
        for (; y + TH <= to; y += TH) tile(Int<TH>{}, y);
        if (y < to && to - from >= TH && !a.other) tile(Int<TH>{}, to - TH), y = to;
        for (; y < to; ++y) tile(Int<1>{}, y);
    }
}

// Threads share the channels where there are many, else the rows
inline void byte_depthwise(const ImageConv<Byte>& a, Byte* scratch, int part, int parts) {
    const Padded padded(a.op, a.source);
    std::memset(scratch, int(a.op.in_code.zero), padded.scratch());
    const int filters = a.made.channels, height = a.made.height;
    const bool by_filter = filters >= 4 * parts;
    const int f0 = by_filter ? (int)split(filters, part, parts) : 0;
    const int f1 = by_filter ? (int)split(filters, part + 1, parts) : filters;
    const int y0 = by_filter ? 0 : (int)split(height, part, parts);
    const int y1 = by_filter ? height : (int)split(height, part + 1, parts);
    const int bands = (y1 - y0 + padded.band - 1) / padded.band, count = (f1 - f0) * bands;
    const auto band = [&](int i, const auto& body) {
        const int from = y0 + i % bands * padded.band;
        body(f0 + i / bands, from, std::min(from + padded.band, y1), scratch + i % 2 * padded.bytes());
    };
    const auto copied = [&](int i) {
        band(i, [&](int f, int from, int to, Byte* copy) { copy_band(a, f, from, to, padded, copy); });
    };
    const auto all = [&](auto k, auto s) {
        for (int i = 0; i < count; ++i) {
            if (!i) copied(0);
            if (i + 1 < count) copied(i + 1);
            band(i, [&](int f, int from, int to, const Byte* copy) {
                byte_depthwise_band<k, s>(a, f, from, to, padded, copy);
            });
        }
    };
    const auto strided = [&](auto k) { a.op.rows.stride == 1 ? all(k, Int<1>{}) : all(k, Int<2>{}); };
    const int kernel = a.op.rows.kernel;
    kernel == 3 ? strided(Int<3>{}) : kernel == 5 ? strided(Int<5>{}) : strided(Int<7>{});
}

}  // namespace
