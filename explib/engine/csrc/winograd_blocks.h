// Blocks of images by Winograd's way: a vector holds the same tile of as many images as it has
// lanes.
#pragma once
#include <algorithm>

#include "tiles.h"
#include "winograd.h"

namespace {

// One tile of every channel, the `t`th of those at once
template <bool INSIDE, int POINTS, int TILES, class T>
void winograd_in(const ConvBlock<T>& a, int channels, int top, int left, int t,
                 typename Types<T>::V* points) {
    USE_TYPES;
    const int64_t plane = block_plane(a.height, a.width), width = a.width;
    const auto inside = [](int at, int size) { return INSIDE || (at >= 0 && at < size); };
    const V* tile = (const V*)a.in + top * width + left;
    for (int c = 0; c < channels; ++c, tile += plane) {
        V columns[6][6];
        repeat<6>([&](auto j) FORCED {
            V x[6] = {}, y[6];
            if (inside(left + j, a.width))
                repeat<6>([&](auto i) FORCED {
                    if (inside(top + i, a.height)) x[i] = tile[i * width + j];
                });
            // or products would be made where they are loaded, apart from what they are added to
            if (!INSIDE) repeat<6>([&](auto i) FORCED { keep(x[i]); });
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

template <int POINTS, int TILES, class T>
void winograd_tiles(const ConvBlock<T>& a, int channels, int filters, int tile,
                    typename Types<T>::V* points) {
    USE_TYPES;
    V* sums = points + 36 * TILES * int64_t(channels);
    const int across = (a.width + 3) / 4;
    int y[TILES], x[TILES];
    for (int t = 0; t < TILES; ++t) {
        y[t] = (tile + t) / across * 4, x[t] = (tile + t) % across * 4;
        const int top = y[t] - 1, left = x[t] - 1;
        if (top >= 0 && left >= 0 && top + 6 <= a.height && left + 6 <= a.width)
            winograd_in<true, POINTS, TILES>(a, channels, top, left, t, points);
        else
            winograd_in<false, POINTS, TILES>(a, channels, top, left, t, points);
    }
    winograd_sums<POINTS, TILES>({(const float*)a.op.winograd, a.start, (const int32_t*)a.index,
                                  channels, filters, 0, filters}, points, sums);
    for (int place = 0; place < filters; ++place)
        for (int t = 0; t < TILES; ++t) {
            const int f = a.order ? a.order[place] : place;
            constexpr int WIDTH = winograd_width(POINTS);
            V out[4][4];
            winograd_outputs<WIDTH, TILES>(sums + int64_t(place) * 6 * WIDTH * TILES + t,
                                           splat(T(a.op.bias[f])), out);
            finish_part<T>(a, f, y[t], x[t], a.out_height - y[t], a.out_width - x[t], out);
        }
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
