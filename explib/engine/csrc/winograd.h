// Convolutions 3x3 by Winograd's way, F(4x4, 3x3): a tile of 4 x 4 outputs is made from 6 x 6 products
// a kernel instead of 144. Each channel's pixels are transformed once for all filters, the sums of
// each filter once for all its kernels. What vectors hold is another tile each, of one image
// (winograd_images.h) or of many (winograd_blocks.h; along columns alone winograd_columns.h).
// Points 0, +-sqrt(1/2), +-sqrt(2) and infinity: errors about twice as large as without it.
#pragma once
#include "plan.h"
#include "vectors.h"

namespace {

constexpr int WINOGRAD_TILES = 2;  // vectors of tiles at once, so that a weight is loaded once for both
constexpr int ROW_BYTES = 48 * 1024;    // points of a row, and of less, that stay in the nearest cache
constexpr int POINTS_BYTES = 32 * 1024;

constexpr bool BY_COLUMNS = BESIDE == 1;  // blocks also along columns alone: with 16 registers

// Whether the nearest cache holds all points of a row
inline bool winograd_whole_rows(int channels) {
    return 6 * WINOGRAD_TILES * VECTOR_BYTES * channels <= ROW_BYTES;
}

// How many points in a row are computed at once: as many as it holds
inline int winograd_together(int channels, int tiles) {
    if (winograd_whole_rows(channels)) return 6;
    for (int points : {3, 2})
        if (points * tiles * VECTOR_BYTES * channels <= POINTS_BYTES) return points;
    return 1;
}

// body(points at once, tiles at once), known to the compiler
template <class Body>
FORCED inline void winograd_sized(int channels, int tiles, const Body& body) {
    const auto sized = [&](auto t) FORCED {
        switch (winograd_together(channels, t)) {
            case 6: return body(Int<6>{}, t);
            case 3: return body(Int<3>{}, t);
            case 2: return body(Int<2>{}, t);
            default: return body(Int<1>{}, t);
        }
    };
    if (tiles == 1) return sized(Int<1>{});
    sized(Int<WINOGRAD_TILES>{});
}

// What one thread needs of memory, in vectors: the points of all channels, the sums of all filters
inline int64_t winograd_vectors(int channels, int filters) {
    return WINOGRAD_TILES * 36 * (int64_t(channels) + filters);
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

// Values of row i of points of a channel: [36 / POINTS][channel][POINTS][tile]
template <int POINTS, int TILES, class V>
FORCED inline void winograd_set(V* points, int channels, int c, int i, int t, const V (&row)[6]) {
    repeat<6>([&](auto j) FORCED {
        const int64_t group = (i * 6 + j) / POINTS;
        points[((group * channels + c) * POINTS + j % POINTS) * TILES + t] = row[j];
    });
}

// Some points of a filter, side by side in a row: its n kernels summed. All six of a row become four
// sums for as many columns of outputs, fewer ones stay what they are
template <int POINTS, int TILES, class V>
FORCED inline void winograd_points(const float* weight, int64_t kernels, const int32_t* index,
                                   int n, const V* points, V* sums) {
    constexpr int SIZE = POINTS * TILES, SETS = SIZE >= 6 ? 1 : SIZE >= 3 ? 2 : 4;
    V acc[SETS][POINTS][TILES] = {};
    const auto add = [&](V(&sum)[POINTS][TILES], int k) FORCED {
        const V* x = points + int64_t(index[k]) * SIZE;
        repeat<POINTS>([&](auto j) FORCED {
            const V w = splat(POINTS == 6 ? weight[k * 6 + j] : weight[j * kernels + k]);
            repeat<TILES>([&](auto t) FORCED { sum[j][t] += x[j * TILES + t] * w; });
        });
    };
    int k = 0;
    for (; k + SETS <= n; k += SETS) repeat<SETS>([&](auto s) FORCED { add(acc[s], k + s); });
    for (; SETS > 1 && k < n; ++k) add(acc[0], k);
    repeat<SETS - 1>([&](auto s) FORCED {
        repeat<POINTS>([&](auto j) FORCED {
            repeat<TILES>([&](auto t) FORCED { acc[0][j][t] += acc[s + 1][j][t]; });
        });
    });
    repeat<TILES>([&](auto t) FORCED {
        V x[POINTS], y[4];
        repeat<POINTS>([&](auto j) FORCED { x[j] = acc[0][j][t]; });
        if constexpr (POINTS == 6) {
            winograd_gather(x, y);
            repeat<4>([&](auto j) FORCED { sums[j * TILES + t] = y[j]; });
        } else {
            repeat<POINTS>([&](auto j) FORCED { sums[j * TILES + t] = x[j]; });
        }
    });
}

// Sums in a row
constexpr int winograd_width(int points) { return points == 6 ? 4 : 6; }

// What the sums of filters are made from
struct WinogradKernels {
    const float* weight;  // op.winograd or op.winograd_alone
    const int32_t *start, *index;
    int channels, filters, first, last;  // of the filters those to compute, by their places
};

// points: as winograd_set has them, sums: [place][row][sum][tile]
template <int POINTS, int TILES, class V>
void winograd_sums(const WinogradKernels& a, const V* points, V* sums) {
    constexpr int WIDTH = winograd_width(POINTS);
    const int64_t kernels = a.start[a.filters];
    for (int i = 0; i < 36; i += POINTS)
        for (int place = a.first; place < a.last; ++place) {
            const int start = a.start[place], n = a.start[place + 1] - start;
            winograd_points<POINTS, TILES>(
                a.weight + i * kernels + start * (POINTS == 6 ? 6 : 1), kernels, a.index + start, n,
                points + int64_t(i) * a.channels * TILES,
                sums + (int64_t(place - a.first) * 6 * WIDTH + i * WIDTH / 6) * TILES);
        }
}

// The outputs of a tile, the first sum of which is at `sums`
template <int WIDTH, int TILES, class V>
FORCED inline void winograd_outputs(const V* sums, V bias, V (&out)[4][4]) {
    V rows[6][4];
    repeat<6>([&](auto i) FORCED {
        V x[WIDTH];
        repeat<WIDTH>([&](auto j) FORCED { x[j] = sums[(i * WIDTH + j) * TILES]; });
        if constexpr (WIDTH == 6)
            winograd_gather(x, rows[i]);
        else
            repeat<4>([&](auto j) FORCED { rows[i][j] = x[j]; });
    });
    repeat<4>([&](auto j) FORCED {
        V x[6], y[4];
        repeat<6>([&](auto i) FORCED { x[i] = rows[i][j]; });
        winograd_gather(x, y);
        repeat<4>([&](auto i) FORCED { out[i][j] = y[i] + bias; });
    });
}

}  // namespace
