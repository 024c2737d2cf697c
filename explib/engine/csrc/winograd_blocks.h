// Blocks of images by Winograd's way: a vector holds the same tile of as many images as it has
// lanes.
#pragma once
#include <algorithm>

#include "tiles.h"
#include "winograd.h"

namespace {

// One tile of every channel, the `t`th of those at once
template <int POINTS, int TILES, class T>
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
            winograd_set<POINTS, TILES>(points, channels, c, i, t, y);
        });
    }
}

// One tile's outputs of a filter, of which there are `rows` and `columns`
template <int WIDTH, int TILES, class T>
FORCED inline void winograd_out(const ConvBlock<T>& a, int f, int y, int x,
                                const typename Types<T>::V* sums) {
    USE_TYPES;
    const int rows = std::min(4, a.out_height - y), columns = std::min(4, a.out_width - x);
    const V bias = splat(T(a.op.bias[f]));
    V out[4][4];
    winograd_outputs<WIDTH, TILES>(sums, bias, out);
    if (rows == 4 && columns == 4) return finish<T, 4, 4>(a, f, y, x, out);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) {
            V one[1][1] = {{out[i][j]}};
            finish<T, 1, 1>(a, f, y + i, x + j, one);
        }
}

template <int POINTS, int TILES, class T>
void winograd_tiles(const ConvBlock<T>& a, int channels, int filters, int tile,
                    typename Types<T>::V* points) {
    USE_TYPES;
    V* sums = points + 36 * TILES * int64_t(channels);
    const int across = (a.width + 3) / 4;
    int y[TILES], x[TILES];
    for (int t = 0; t < TILES; ++t) {
        y[t] = (tile + t) / across * 4, x[t] = (tile + t) % across * 4;
        winograd_in<POINTS, TILES>(a, channels, y[t] - 1, x[t] - 1, t, points);
    }
    winograd_sums<POINTS, TILES>({(const float*)a.op.winograd, a.start, (const int32_t*)a.index,
                                  channels, filters, 0, filters}, points, sums);
    constexpr int WIDTH = winograd_width(POINTS);
    for (int place = 0; place < filters; ++place)
        for (int t = 0; t < TILES; ++t)
            winograd_out<WIDTH, TILES>(a, a.order ? a.order[place] : place, y[t], x[t],
                                       sums + int64_t(place) * 6 * WIDTH * TILES + t);
}

// Threads share the tiles
template <class T>
void winograd_block(const ConvBlock<T>& a, int channels, int filters,
                    typename Types<T>::V* memory, int part, int parts) {
    const int all = ((a.width + 3) / 4) * ((a.height + 3) / 4);
    const int last = (int)split(all, part + 1, parts);
    for (int tile = (int)split(all, part, parts); tile < last;) {
        const int count = std::min(WINOGRAD_TILES, last - tile);
        winograd_sized(channels, count, [&](auto points, auto tiles) FORCED {
            winograd_tiles<points, tiles>(a, channels, filters, tile, memory);
        });
        tile += count;
    }
}

}  // namespace
