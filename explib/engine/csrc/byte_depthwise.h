// int8: depthwise convolutions, a channel at a time, the words (bytes.h) in registers only. A single
// image's plane is copied, with the code of zero on every side, so that each is a load and a shuffle.
#pragma once
#include <algorithm>
#include <cstring>

#include "byte_images.h"
#include "planes.h"
#include "tiles.h"

namespace {

constexpr int BAND_BYTES = 16 * 1024;  // copied at once, of the nearest cache
constexpr int BYTE_ROWS = 7;            // of outputs at once

// What one thread computes: filters f0 to f1 where there are many, else rows y0 to y1 of all
struct DepthwiseShare {
    int f0, f1, y0, y1;
    DepthwiseShare(int filters, int height, int part, int parts)
        : f0(0), f1(filters), y0(0), y1(height) {
        int& first = filters >= 4 * parts ? f0 : y0;
        int& last = filters >= 4 * parts ? f1 : y1;
        const int all = last;
        first = (int)split(all, part, parts), last = (int)split(all, part + 1, parts);
    }
};

// body(kernel, stride), known to the compiler
template <class Body>
inline void depthwise_sized(const Op& op, const Body& body) {
    const auto strided = [&](auto k) {
        op.rows.stride == 1 ? body(k, Int<1>{}) : body(k, Int<2>{});
    };
    const int kernel = op.rows.kernel;
    kernel == 3 ? strided(Int<3>{}) : kernel == 5 ? strided(Int<5>{}) : strided(Int<7>{});
}

// tile(rows, y) for rows `from` to `to`, the last one over others if that may be
template <class Tile>
FORCED inline void depthwise_tiles(int from, int to, bool again, const Tile& tile) {
    int y = from;
    for (; y + BYTE_ROWS <= to; y += BYTE_ROWS) tile(Int<BYTE_ROWS>{}, y);
    if (y < to && to - from >= BYTE_ROWS && again) tile(Int<BYTE_ROWS>{}, to - BYTE_ROWS), y = to;
    for (; y < to; ++y) tile(Int<1>{}, y);
}

// Sums of TH rows, one below the other, of which word(i, q) are those of the input's row i
template <int K, int S, int TH, class Word>
FORCED inline void depthwise_sums(const int32_t* weight, Words (&sums)[TH], const Word& word) {
    constexpr int Q = (K + 3) / 4;
    Words weights[K][Q];
#pragma GCC unroll 64
    for (int i = 0; i < K * Q; ++i) weights[i / Q][i % Q] = Words{} + weight[i];
    repeat<((TH - 1) * S + K) * Q>([&](auto n) FORCED {
        constexpr int i = n / Q, q = n % Q;
        const Words codes = word(i, q);
#pragma GCC unroll 64
        for (int ky = 0; ky < K; ++ky) {
            const int dy = i - ky;
            if (dy >= 0 && dy % S == 0 && dy / S < TH)
                sums[dy / S] = add_dots(sums[dy / S], codes, weights[ky][q]);
        }
    });
}

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

// TH rows of outputs of filter f, BYTE_LANES of each, from (y, x) on; their first code is at `codes`
template <int K, int S, int TH>
FORCED inline void byte_depthwise_tile(const ImageConv<Byte>& a, int f, int y, int x,
                                       const Byte* codes, int64_t pitch, const int32_t* weight) {
    Words sums[TH] = {};
    if (weight)
        depthwise_sums<K, S>(weight, sums, [&](auto i, auto q) FORCED {
            return neighbours<S>(codes + i * pitch + q * 4);
        });
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
        const int fits = (BAND_BYTES / pitch - kernel) / stride + 1;
        band = std::max(fits / BYTE_ROWS * BYTE_ROWS, BYTE_ROWS);
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
    const int k = a.op.flat_start[f];
    const bool empty = k == a.op.flat_start[f + 1];
    const int32_t* weight = (const int32_t*)a.op.flat_weight + int64_t(k) * K * ((K + 3) / 4);
    for (int x = (a.made.width - 1) / BYTE_LANES * BYTE_LANES; x >= 0; x -= BYTE_LANES) {
        const auto tile = [&](auto th, int y) FORCED {
            byte_depthwise_tile<K, S, th>(a, f, y, x,
                                          copy + int64_t(y - from) * S * padded.pitch + x * S,
                                          padded.pitch, empty ? nullptr : weight);
        };
        depthwise_tiles(from, to, !a.other, tile);
    }
}

// scratch: of this thread
inline void byte_depthwise(const ImageConv<Byte>& a, Byte* scratch, int part, int parts) {
    const Padded padded(a.op, a.source);
    std::memset(scratch, int(a.op.in_code.zero), padded.scratch());
    const DepthwiseShare share(a.made.channels, a.made.height, part, parts);
    const int bands = (share.y1 - share.y0 + padded.band - 1) / padded.band;
    const int count = (share.f1 - share.f0) * bands;
    const auto band = [&](int i, const auto& body) {
        const int from = share.y0 + i % bands * padded.band;
        const int to = std::min(from + padded.band, share.y1);
        body(share.f0 + i / bands, from, to, scratch + i % 2 * padded.bytes());
    };
    const auto copied = [&](int i) {
        band(i, [&](int f, int from, int to, Byte* copy) {
            copy_band(a, f, from, to, padded, copy);
        });
    };
    depthwise_sized(a.op, [&](auto k, auto s) {
        for (int i = 0; i < count; ++i) {
            if (!i) copied(0);
            if (i + 1 < count) copied(i + 1);
            band(i, [&](int f, int from, int to, const Byte* copy) {
                byte_depthwise_band<k, s>(a, f, from, to, padded, copy);
            });
        }
    });
}

// ---- Blocks of images, whose pixels' codes lie beside each other

// Rows y0 to y1 of filter f
template <int K, int S>
[[gnu::noinline]] void byte_depthwise_rows(const ConvBlock<Byte>& a, int channels, int filters,
                                           int f, int y0, int y1) {
    constexpr int Q = (K + 3) / 4;
    const int width = a.width, k = a.start[f];
    const bool empty = k == a.start[f + 1];
    const int32_t* weight = a.weight + int64_t(k) * K * Q;
    const Byte* plane = a.in + int64_t(f) * channels / filters * block_plane(a.height, width) *
                                   BYTE_LANES;
    Byte outside[BYTE_LANES];
    std::memset(outside, int(a.op.in_code.zero), BYTE_LANES);
    const Words none = quads(outside, outside, outside, outside);
    const auto tile = [&](auto th, int y) FORCED {
        for (int x = 0; x < a.out_width; ++x) {
            Words sums[th] = {};
            const auto word = [&](auto i, auto q) FORCED {
                const int row = y * S - K / 2 + i, at = x * S - K / 2 + q * 4;
                if (row < 0 || row >= a.height) return none;
                return quads_of_row(plane + int64_t(row) * width * BYTE_LANES, width, at,
                                    std::min(3, K - 1 - q * 4), outside);
            };
            if (!empty) depthwise_sums<K, S>(weight, sums, word);
            const int64_t first = place_in_block(a, f, y, x);
            const int64_t step = int64_t(a.out_width) * BYTE_LANES;
            end_sums<th>(
                a.op, f, sums, a.other, [&](int i) FORCED { return first + i * step; },
                [&](int i, Types<float>::V codes) FORCED {
                    store(a.out + first + i * step, codes);
                });
        }
    };
    depthwise_tiles(y0, y1, !a.other, tile);
}

inline void byte_depthwise(const ConvBlock<Byte>& a, int channels, int filters, int part,
                           int parts) {
    const DepthwiseShare share(filters, a.out_height, part, parts);
    depthwise_sized(a.op, [&](auto k, auto s) {
        for (int f = share.f0; f < share.f1; ++f)
            byte_depthwise_rows<k, s>(a, channels, filters, f, share.y0, share.y1);
    });
}

}  // namespace
