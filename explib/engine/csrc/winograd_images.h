// Single images by Winograd's way: a vector holds tiles of one image, in four runs of LANES / 4 side
// by side. Each quarter of a vector of pixels is a row of one tile, so that turning the 4 x 4 numbers
// of each quarter of four such vectors makes a vector for each column of pixels, and back.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "planes.h"
#include "winograd.h"

namespace {

struct WinogradImage : ImageConv<float> {
    static constexpr int RUN = Types<float>::lanes / 4;  // tiles
    int tile_rows() const { return (made.height + 3) / 4; }
    int row_runs() const { return ((made.width + 3) / 4 + RUN - 1) / RUN; }
    int vectors() const { return (tile_rows() * row_runs() + 3) / 4; }
};

// Where the four runs of a vector are, and which of their outputs are in the image
struct WinogradRuns {
    int64_t in[4][6];  // from a plane's first pixel, of every row of pixels
    int64_t out[4];
    int rows[4], columns[4];
    Types<float>::Words inside[2];  // whether columns 4 and 5 of a lane's pixels are no other row's
    bool whole = true;              // whether all are
    bool full = true;               // whether all outputs are in the image
    WinogradRuns() = default;
    WinogradRuns(const WinogradImage& a, int vector) {
        constexpr int RUN = WinogradImage::RUN;
        const int across = a.row_runs(), last = across * a.tile_rows() - 1;
        for (int q = 0; q < 4; ++q) {
            const int run = std::min(vector * 4 + q, last);
            const int y = run / across * 4, x = run % across * RUN * 4;
            for (int i = 0; i < 6; ++i)
                in[q][i] = int64_t(std::min(y + i - 1, a.made.height)) * a.pitch + x - 1;
            out[q] = int64_t(y) * a.pitch + x;
            const bool own = run == vector * 4 + q;
            rows[q] = own ? std::min(4, a.made.height - y) : 0;
            columns[q] = std::min(4 * RUN, a.made.width - x);
            full &= rows[q] == 4 && columns[q] == 4 * RUN;
            for (int tile = 0; tile < RUN; ++tile)
                for (int j : {4, 5}) {
                    const int pixel = x + 4 * tile + j - 1;
                    inside[j - 4][4 * tile + q] = pixel <= a.made.width ? -1 : 0;
                    whole &= pixel <= a.made.width || x + 4 * tile >= a.made.width;
                }
        }
    }
};

// Lane i of the result: of each quarter two from the same quarter of a, two of b, by turns
template <int FIRST, class V>
FORCED inline V quarters(V a, V b) {
    V made;
    constexpr int LANES = sizeof(V) / 4;
#if SHUFFLES
    [&]<int... I>(std::integer_sequence<int, I...>) FORCED {
        made = __builtin_shufflevector(a, b, (I / 4 * 4 + FIRST + I % 4 / 2 + I % 2 * LANES)...);
    }(std::make_integer_sequence<int, LANES>{});
#else
    for (int i = 0; i < LANES; ++i) made[i] = (i % 2 ? b : a)[i / 4 * 4 + FIRST + i % 4 / 2];
#endif
    return made;
}

// Vector j of the result has in lanes 4 g to 4 g + 3 the numbers j of the quarters g
template <class V>
FORCED inline void turn(V (&x)[4]) {
    const V a = quarters<0>(x[0], x[2]), b = quarters<0>(x[1], x[3]);
    const V c = quarters<2>(x[0], x[2]), d = quarters<2>(x[1], x[3]);
    x[0] = quarters<0>(a, b), x[1] = quarters<2>(a, b);
    x[2] = quarters<0>(c, d), x[3] = quarters<2>(c, d);
}

// One vector of tiles of every channel, the `t`th of those at once. Down the columns first, where a
// vector still is pixels side by side; the two pixels of every run that go beyond it are a vector too
template <int POINTS, int TILES>
[[gnu::noinline]] void winograd_in(const WinogradImage& a, const WinogradRuns& runs, int t,
                                   Types<float>::V* points) {
    using V = Types<float>::V;
    using Loose = Types<float>::Loose;
    using Words = Types<float>::Words;
    constexpr int LANES = Types<float>::lanes, ENDS = LANES < 8 ? 2 : 1;
    typedef double Twos __attribute__((vector_size(VECTOR_BYTES)));  // pixels
    const int channels = a.source.channels;
    const float* plane = a.in;
    for (int c = 0; c < channels; ++c, plane += a.in_plane) {
        V rows[6][4], ends[6][ENDS];
        repeat<4>([&](auto q) FORCED {
            V x[6], y[6];
            repeat<6>([&](auto i) FORCED { x[i] = *(const Loose*)(plane + runs.in[q][i]); });
            winograd_spread(x, y);
            repeat<6>([&](auto i) FORCED { rows[i][q] = y[i]; });
        });
        repeat<ENDS>([&](auto e) FORCED {
            V x[6], y[6];
            repeat<6>([&](auto i) FORCED {
                Twos two = {};
                repeat<4 / ENDS>([&](auto q) FORCED {
                    double value;
                    std::memcpy(&value, plane + runs.in[q + e * (4 / ENDS)][i] + LANES, 8);
                    two[int(q)] = value;
                });
                x[i] = (V)two;
            });
            winograd_spread(x, y);
            repeat<6>([&](auto i) FORCED { ends[i][e] = y[i]; });
        });
        repeat<6>([&](auto i) FORCED {
            V x[6], y[6];
            turn(rows[i]);
            repeat<4>([&](auto j) FORCED { x[j] = rows[i][j]; });
            // of every tile what the next one begins with
            repeat<2>([&](auto j) FORCED {
                const V beyond = picked<2, j>(ends[i][0], ends[i][ENDS - 1]);
                if constexpr (LANES == 4)
                    x[4 + j] = beyond;
                else
                    x[4 + j] = picked<1, 4>(x[j], beyond);
                if (!runs.whole) x[4 + j] = (V)((Words)x[4 + j] & runs.inside[j]);
            });
            winograd_spread(x, y);
            winograd_set<POINTS, TILES>(points, channels, c, i, t, y);
        });
    }
}

// The outputs of filters at places `first` to `last`, the first sum of which is at `sums`
template <int WIDTH, int TILES>
[[gnu::noinline]] void winograd_out(const WinogradImage& a, const WinogradRuns& runs, int first,
                                    int last, const Types<float>::V* sums) {
    using V = Types<float>::V;
    using Loose = Types<float>::Loose;
    // copies, which what is written cannot be
    const bool full = runs.full;
    const int64_t pitch = a.pitch, plane = a.out_plane;
    const float *const bias = a.op.bias, *const other = a.other;
    const int32_t* const order = a.op.order;
    float* const to = a.out;
    int64_t begin[4];
    repeat<4>([&](auto q) FORCED { begin[q] = runs.out[q]; });
    for (int place = first; place < last; ++place, sums += 6 * WIDTH * TILES) {
        const int f = order ? order[place] : place;
        V out[4][4];
        winograd_outputs<WIDTH, TILES>(sums, splat(bias[f]), out);
        repeat<4>([&](auto i) FORCED { turn(out[i]); });
        const auto each = [&](const auto& change) FORCED {
            repeat<4>([&](auto q) FORCED {
                const int64_t at = f * plane + begin[q];
                repeat<4>([&](auto i) FORCED {
                    if (full || i < runs.rows[q]) change(out[i][q], at + i * pitch, q);
                });
            });
        };
        if (other)
            each([=](V& value, int64_t at, int) FORCED { value += *(const Loose*)(other + at); });
        activate<16>(a.op, f, (V(&)[16])out);
        if (full)
            each([=](V value, int64_t at, int) FORCED { *(Loose*)(to + at) = value; });
        else
            each([&](V value, int64_t at, int q) FORCED {
                store_lanes(to + at, value, 0, runs.columns[q]);
            });
    }
}

// Vectors of tiles from `vector` on of the filters at places `first` to `last`
template <int POINTS, int TILES>
void winograd_tiles(const WinogradImage& a, int vector, int first, int last,
                    Types<float>::V* points) {
    Types<float>::V* sums = points + 36 * TILES * int64_t(a.source.channels);
    WinogradRuns runs[TILES];
    for (int t = 0; t < TILES; ++t) {
        runs[t] = WinogradRuns(a, vector + t);
        winograd_in<POINTS, TILES>(a, runs[t], t, points);
    }
    winograd_sums<POINTS, TILES>({(const float*)a.op.winograd_alone, a.op.start, a.op.index,
                                  a.source.channels, a.made.channels, first, last}, points, sums);
    for (int t = 0; t < TILES; ++t)
        winograd_out<winograd_width(POINTS), TILES>(a, runs[t], first, last, sums + t);
}

// Threads share the tiles where there are many, else the filters
inline void winograd_image(const WinogradImage& a, Types<float>::V* memory, int part, int parts) {
    int first = 0, last = a.made.channels;
    if (parts > 1 && a.vectors() < 2 * parts) {
        first = a.op.share[part], last = a.op.share[part + 1];
        part = 0, parts = 1;
    }
    const int end = (int)split(a.vectors(), part + 1, parts);
    for (int vector = (int)split(a.vectors(), part, parts); vector < end;) {
        const int count = std::min(end - vector, WINOGRAD_TILES);
        winograd_sized(a.source.channels, count, [&](auto points, auto tiles) FORCED {
            winograd_tiles<points, tiles>(a, vector, first, last, memory);
        });
        vector += count;
    }
}

}  // namespace
