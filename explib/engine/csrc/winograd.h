// Convolutions 3x3 by Winograd's way, F(4x4, 3x3): a tile of 4 x 4 outputs is made from 6 x 6 products
// a kernel instead of 144. Each channel's pixels are transformed once for all filters, the sums of
// each filter once for all its kernels. What vectors hold is another tile each, of one image
// (winograd_images.h; of few tiles two points of each, winograd_four.h) or of many (winograd_blocks.h;
// along columns alone winograd_columns.h).
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

// A product that is added and subtracted: where registers are few, one product and two sums are
// quicker than two products of a constant that has to be loaded for each
template <class V>
FORCED inline V product(V value) {
    if constexpr (BY_COLUMNS) keep(value);
    return value;
}

// Of the points two by two that take the same pixels: which these are
constexpr int POINT_PAIRS[3][2] = {{0, 5}, {1, 2}, {3, 4}};

// Six pixels in a row as values at the points, those of one pair or all
template <int PAIR, class V>
FORCED inline void winograd_spread(const V (&x)[6], V& one, V& two) {
    if constexpr (PAIR == 0) {
        one = x[4] - 2.5f * x[2] + x[0];
        two = x[5] - 2.5f * x[3] + x[1];
    } else if constexpr (PAIR == 1) {
        const V a = x[4] - 2.0f * x[2], b = product((x[3] - 2.0f * x[1]) * POINT_A);
        one = a + b, two = a - b;
    } else {
        const V c = x[4] - 0.5f * x[2], d = product((x[3] - 0.5f * x[1]) * POINT_B);
        one = c + d, two = c - d;
    }
}
template <class V>
FORCED inline void winograd_spread(const V (&x)[6], V (&y)[6]) {
    repeat<3>([&](auto pair) FORCED {
        winograd_spread<pair>(x, y[POINT_PAIRS[pair][0]], y[POINT_PAIRS[pair][1]]);
    });
}

// Products at the points as outputs in a row: 0 and 2, or 1 and 3, or all four
template <int ODD, class V>
FORCED inline void winograd_gather(const V (&x)[6], V& one, V& two) {
    if constexpr (ODD) {
        const V b = product((x[1] - x[2]) * POINT_A), d = product((x[3] - x[4]) * POINT_B);
        one = b + d;
        two = 0.5f * b + (2.0f * d + x[5]);
    } else {
        const V a = x[1] + x[2], c = x[3] + x[4];
        one = x[0] + a + c;
        two = 0.5f * a + 2.0f * c;
    }
}
template <class V>
FORCED inline void winograd_gather(const V (&x)[6], V (&y)[4]) {
    winograd_gather<0>(x, y[0], y[2]);
    winograd_gather<1>(x, y[1], y[3]);
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

// The sums of a row of points, of which the first is at `sums`, as four outputs
template <int WIDTH, int TILES, class V>
FORCED inline void winograd_row(const V* sums, V (&out)[4]) {
    V x[WIDTH];
    repeat<WIDTH>([&](auto j) FORCED { x[j] = sums[j * TILES]; });
    if constexpr (WIDTH == 6)
        winograd_gather(x, out);
    else
        repeat<4>([&](auto j) FORCED { out[j] = x[j]; });
}

// The outputs of a tile
template <int WIDTH, int TILES, class V>
FORCED inline void winograd_outputs(const V* sums, V bias, V (&out)[4][4]) {
    V rows[6][4];
    repeat<6>([&](auto i) FORCED { winograd_row<WIDTH, TILES>(sums + i * WIDTH * TILES, rows[i]); });
    repeat<4>([&](auto j) FORCED {
        V x[6], y[4];
        repeat<6>([&](auto i) FORCED { x[i] = rows[i][j]; });
        winograd_gather(x, y);
        repeat<4>([&](auto i) FORCED { out[i][j] = y[i] + bias; });
    });
}

}  // namespace
