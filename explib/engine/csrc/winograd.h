// Convolutions 3x3 of blocks of images by Winograd's way, F(4x4, 3x3): a tile of 4 x 4 outputs is made
// from 6 x 6 products a kernel instead of 144. Each channel's pixels are transformed once for all
// filters, the sums of each filter once for all its kernels.
// Points 0, +-sqrt(1/2), +-sqrt(2) and infinity: errors about twice as large as without it.
#pragma once
#include <algorithm>

#include "tiles.h"

namespace {

constexpr int WINOGRAD_TILES = 2;  // side by side, so that a weight is loaded once for both
constexpr int SPREAD = 6 * WINOGRAD_TILES;  // vectors of a row of points

// What one thread needs of memory, in vectors: the points of all channels, the sums of all filters
inline int64_t winograd_vectors(int channels, int filters) {
    return 6 * int64_t(SPREAD) * channels + 4 * int64_t(SPREAD) * filters;
}

constexpr float POINT_A = 0.707106781f, POINT_B = 1.41421356f;

// Six pixels in a row as values at the points
template <class V>
FORCED inline void winograd_spread(const V (&x)[6], V (&y)[6]) {
    y[0] = x[4] - 2.5f * x[2] + x[0];
    const V a = x[4] - 2.0f * x[2], b = (x[3] - 2.0f * x[1]) * POINT_A;
    y[1] = a + b, y[2] = a - b;
    const V c = x[4] - 0.5f * x[2], d = (x[3] - 0.5f * x[1]) * POINT_B;
    y[3] = c + d, y[4] = c - d;
    y[5] = x[5] - 2.5f * x[3] + x[1];
}

// Products at the points as four outputs in a row
template <class V>
FORCED inline void winograd_gather(const V (&x)[6], V (&y)[4]) {
    const V a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = x[3] - x[4];
    y[0] = x[0] + a + c;
    y[1] = POINT_A * b + POINT_B * d;
    y[2] = 0.5f * a + 2.0f * c;
    y[3] = 0.5f * POINT_A * b + 2.0f * POINT_B * d + x[5];
}

// One tile of every channel, the `t`th of those side by side; points: [row][channel][column][tile]
template <class T>
void winograd_in(const ConvBlock<T>& a, int channels, int top, int left, int t,
                 typename Types<T>::V* points) {
    USE_TYPES;
    const int64_t plane = block_plane(a.height, a.width);
    const int from = std::max(0, -left), to = std::min(6, a.width - left);
    for (int c = 0; c < channels; ++c) {
        const V* pixels = (const V*)a.in + c * plane;
        V columns[6][6];
        repeat<6>([&](auto j) FORCED {
            V x[6] = {}, y[6];
            if (j >= from && j < to)
                repeat<6>([&](auto i) FORCED {
                    if (top + i >= 0 && top + i < a.height)
                        x[i] = pixels[int64_t(top + i) * a.width + left + j];
                });
            winograd_spread(x, y);
            repeat<6>([&](auto i) FORCED { columns[i][j] = y[i]; });
        });
        repeat<6>([&](auto i) FORCED {
            V y[6];
            winograd_spread(columns[i], y);
            V* row = points + (int64_t(i) * channels + c) * SPREAD + t;
            repeat<6>([&](auto j) FORCED { row[j * WINOGRAD_TILES] = y[j]; });
        });
    }
}

// One row of points of a filter, its n kernels summed; sums: [column of outputs][tile]
template <class T>
FORCED inline void winograd_row(const T* weight, const int32_t* index, int n,
                                const typename Types<T>::V* points, typename Types<T>::V* sums) {
    USE_TYPES;
    V acc[6][WINOGRAD_TILES] = {};
    for (int k = 0; k < n; ++k, weight += 6) {
        const V* x = points + int64_t(index[k]) * SPREAD;
        __builtin_prefetch((const char*)weight + 1024);
        repeat<6>([&](auto j) FORCED {
            const V w = splat(weight[j]);
            repeat<WINOGRAD_TILES>([&](auto t) FORCED {
                acc[j][t] += x[j * WINOGRAD_TILES + t] * w;
            });
        });
    }
    repeat<WINOGRAD_TILES>([&](auto t) FORCED {
        V x[6], y[4];
        repeat<6>([&](auto j) FORCED { x[j] = acc[j][t]; });
        winograd_gather(x, y);
        repeat<4>([&](auto j) FORCED { sums[j * WINOGRAD_TILES + t] = y[j]; });
    });
}

// One tile's outputs of a filter, of which there are `rows` and `columns`
template <class T>
FORCED inline void winograd_out(const ConvBlock<T>& a, int f, int y, int x,
                                const typename Types<T>::V* sums) {
    USE_TYPES;
    const int rows = std::min(4, a.out_height - y), columns = std::min(4, a.out_width - x);
    const V bias = splat(T(a.op.bias[f]));
    const auto column = [&](int j, V(&out)[4][1]) FORCED {
        V in[6], made[4];
        repeat<6>([&](auto i) FORCED { in[i] = sums[(i * 4 + j) * WINOGRAD_TILES]; });
        winograd_gather(in, made);
        repeat<4>([&](auto i) FORCED { out[i][0] = made[i] + bias; });
    };
    for (int j = 0; j < columns; ++j) {
        V out[4][1];
        column(j, out);
        if (rows == 4) {
            finish<T, 4, 1>(a, f, y, x + j, out);
            continue;
        }
        for (int i = 0; i < rows; ++i) {
            V one[1][1] = {{out[i][0]}};
            finish<T, 1, 1>(a, f, y + i, x + j, one);
        }
    }
}

// Threads share the tiles
template <class T>
void winograd(const ConvBlock<T>& a, int channels, int filters, typename Types<T>::V* memory,
              int part, int parts) {
    USE_TYPES;
    const int32_t* index = (const int32_t*)a.index;
    V *points = memory, *sums = memory + 6 * int64_t(SPREAD) * channels;
    const int across = (a.width + 3) / 4, tiles = across * ((a.height + 3) / 4);
    const int last = (int)split(tiles, part + 1, parts);
    for (int tile = (int)split(tiles, part, parts); tile < last; tile += WINOGRAD_TILES) {
        const int count = std::min(WINOGRAD_TILES, last - tile);
        const auto y = [&](int t) { return (tile + t) / across * 4; };
        const auto x = [&](int t) { return (tile + t) % across * 4; };
        for (int t = 0; t < count; ++t)
            winograd_in(a, channels, y(t) - 1, x(t) - 1, t, points);
        for (int i = 0; i < 6; ++i)
            for (int place = 0; place < filters; ++place) {
                const int start = a.start[place], n = a.start[place + 1] - start;
                winograd_row<T>((const T*)a.op.winograd + int64_t(start) * 36 + int64_t(i) * n * 6,
                                index + start, n, points + int64_t(i) * channels * SPREAD,
                                sums + (int64_t(place) * 6 + i) * 4 * WINOGRAD_TILES);
            }
        for (int place = 0; place < filters; ++place)
            for (int t = 0; t < count; ++t)
                winograd_out(a, a.order ? a.order[place] : place, y(t), x(t),
                             sums + int64_t(place) * 24 * WINOGRAD_TILES + t);
    }
}

}  // namespace
