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

// Where the four runs of a vector are, and which of their outputs are in the image. `next`: to the
// plane of runs 2 and 3 where they are those of another one, else 0
struct WinogradRuns {
    int64_t in[4];   // from a plane's first pixel, of the first of six rows
    int rows_in[4];  // which of these are in the image or beside it
    int64_t out[4];
    int rows[4], columns[4];
    bool cut = false;               // whether not all six are, of any run
    Types<float>::Words inside[2];  // whether columns 4 and 5 of a lane's pixels are no other row's
    bool whole = true;              // whether all are
    bool full = true;               // whether all outputs are in the image
    WinogradRuns() = default;
    WinogradRuns(const WinogradImage& a, int vector, bool two_planes = false, int64_t next = 0) {
        constexpr int RUN = WinogradImage::RUN;
        const int across = a.row_runs(), last = across * a.tile_rows() - 1;
        for (int q = 0; q < 4; ++q) {
            const int wanted = two_planes ? q % 2 : vector * 4 + q, run = std::min(wanted, last);
            const int y = run / across * 4, x = run % across * RUN * 4;
            in[q] = int64_t(y - 1) * a.pitch + x - 1 + q / 2 * next;
            rows_in[q] = std::min(6, a.made.height - y + 2);
            cut |= rows_in[q] < 6;
            out[q] = int64_t(y) * a.pitch + x;
            const bool own = run == wanted;
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

// The pixels of four runs, rows of `pitch` from at[q] on
struct WinogradPixels {
    static constexpr int ROW = 2 * Types<float>::lanes;
    const float* at[4];
    int64_t pitch;
    float copy[4][6][ROW];  // where some rows lie beyond those beside the image: with zeros for these
    FORCED WinogradPixels(const float* plane, int64_t pitch, const WinogradRuns& runs)
        : pitch(pitch) {
        for (int q = 0; q < 4; ++q) at[q] = plane + runs.in[q];
        if (runs.cut) copied(runs);
    }

  private:
    [[gnu::noinline]] void copied(const WinogradRuns& runs) {
        for (int q = 0; q < 4; ++q) {
            for (int i = 0; i < 6; ++i)
                if (i < runs.rows_in[q])
                    std::copy_n(at[q] + i * pitch, ROW / 2 + 2, copy[q][i]);
                else
                    std::fill_n(copy[q][i], ROW / 2 + 2, 0.0f);
            at[q] = copy[q][0];
        }
        pitch = ROW;
    }
};

// One vector of tiles at the points, set(i, values) of each row of them. Down the columns first, where
// a vector still is pixels side by side, for two rows of points at a time, which registers hold; the
// two pixels of every run that go beyond it are a vector too
template <class Set>
FORCED inline void winograd_pixels(const WinogradPixels& pixels, const WinogradRuns& runs,
                                   const Set& set) {
    using V = Types<float>::V;
    using Loose = Types<float>::Loose;
    using Words = Types<float>::Words;
    constexpr int LANES = Types<float>::lanes, ENDS = LANES < 8 ? 2 : 1;
    typedef double Twos __attribute__((vector_size(VECTOR_BYTES)));  // pixels
    const int64_t pitch = pixels.pitch;
    const float* at[4];
    repeat<4>([&](auto q) FORCED { at[q] = pixels.at[q]; });
    V ends[6][ENDS];
    repeat<ENDS>([&](auto e) FORCED {
        V x[6], y[6];
        repeat<6>([&](auto i) FORCED {
            Twos two = {};
            repeat<4 / ENDS>([&](auto q) FORCED {
                double value;
                std::memcpy(&value, at[q + e * (4 / ENDS)] + i * pitch + LANES, 8);
                two[int(q)] = value;
            });
            x[i] = (V)two;
        });
        winograd_spread(x, y);
        repeat<6>([&](auto i) FORCED { ends[i][e] = y[i]; });
    });
    repeat<3>([&](auto pair) FORCED {
        V rows[2][4];
        repeat<4>([&](auto q) FORCED {
            V x[6];
            repeat<6>([&](auto i) FORCED { x[i] = *(const Loose*)(at[q] + i * pitch); });
            winograd_spread<pair>(x, rows[0][q], rows[1][q]);
        });
        repeat<2>([&](auto which) FORCED {
            constexpr int ROW = POINT_PAIRS[pair][which];
            V x[6], y[6];
            turn(rows[which]);
            repeat<4>([&](auto j) FORCED { x[j] = rows[which][j]; });
            // of every tile what the next one begins with
            repeat<2>([&](auto j) FORCED {
                const V beyond = picked<2, j>(ends[ROW][0], ends[ROW][ENDS - 1]);
                if constexpr (LANES == 4)
                    x[4 + j] = beyond;
                else
                    x[4 + j] = picked<1, 4>(x[j], beyond);
                if (!runs.whole) x[4 + j] = (V)((Words)x[4 + j] & runs.inside[j]);
            });
            winograd_spread(x, y);
            set(Int<ROW>{}, y);
        });
    });
}

// The same of every channel, the `t`th vector of those at once
template <int POINTS, int TILES>
[[gnu::noinline]] void winograd_in(const WinogradImage& a, const WinogradRuns& runs, int t,
                                   Types<float>::V* points) {
    const int channels = a.source.channels;
    for (int c = 0; c < channels; ++c)
        winograd_pixels({a.in + c * a.in_plane, a.pitch, runs}, runs,
                        [&](auto i, Types<float>::V(&row)[6]) FORCED {
                            winograd_set<POINTS, TILES>(points, channels, c, i, t, row);
                        });
}

// Where outputs go: copies, which what is written cannot be
struct WinogradTarget {
    bool full;
    int64_t pitch, plane, begin[4];
    const float* other;
    float* out;
    WinogradTarget(const WinogradImage& a, const WinogradRuns& runs)
        : full(runs.full), pitch(a.pitch), plane(a.out_plane), other(a.other), out(a.out) {
        std::copy_n(runs.out, 4, begin);
    }
};

// Rows FIRST and FIRST + 2 of the outputs of a vector of tiles, column by column, to the planes of
// filters f, of each as many runs as of another
template <int FIRST, int FILTERS>
FORCED inline void winograd_store(const Op& op, const WinogradRuns& runs, const WinogradTarget& to,
                                  const int (&f)[FILTERS], Types<float>::V (&out)[2][4]) {
    using V = Types<float>::V;
    using Loose = Types<float>::Loose;
    constexpr int RUNS = 4 / FILTERS;
    V values[FILTERS][2 * RUNS];
    repeat<2>([&](auto i) FORCED {
        turn(out[i]);
        repeat<4>([&](auto q) FORCED { values[q / RUNS][i * RUNS + q % RUNS] = out[i][q]; });
    });
    const auto each = [&](const auto& change) FORCED {
        repeat<4>([&](auto q) FORCED {
            const int64_t at = f[q / RUNS] * to.plane + to.begin[q];
            repeat<2>([&](auto i) FORCED {
                constexpr int ROW = FIRST + 2 * i;
                if (to.full || ROW < runs.rows[q])
                    change(values[q / RUNS][i * RUNS + q % RUNS], at + ROW * to.pitch, q);
            });
        });
    };
    if (to.other)
        each([&](V& value, int64_t at, int) FORCED { value += *(const Loose*)(to.other + at); });
    repeat<FILTERS>([&](auto n) FORCED { activate<2 * RUNS>(op, f[n], values[n]); });
    if (to.full)
        each([&](V value, int64_t at, int) FORCED { *(Loose*)(to.out + at) = value; });
    else
        each([&](V value, int64_t at, int q) FORCED {
            store_lanes(to.out + at, value, 0, runs.columns[q]);
        });
}

// The outputs of a vector of tiles, of which sum(i, j) is that of column j of row i of the points
template <int FILTERS, class Sum>
FORCED inline void winograd_finish(const Op& op, const WinogradRuns& runs, const WinogradTarget& to,
                                   const int (&f)[FILTERS], Types<float>::V bias, const Sum& sum) {
    using V = Types<float>::V;
    repeat<2>([&](auto odd) FORCED {
        V out[2][4];
        repeat<4>([&](auto j) FORCED {
            V x[6];
            repeat<6>([&](auto i) FORCED { x[i] = sum(i, j); });
            winograd_gather<odd>(x, out[0][j], out[1][j]);
            out[0][j] += bias, out[1][j] += bias;
        });
        winograd_store<odd>(op, runs, to, f, out);
    });
}

// The outputs of filters at places `first` to `last`, the first sum of which is at `sums`
template <int WIDTH, int TILES>
[[gnu::noinline]] void winograd_out(const WinogradImage& a, const WinogradRuns& runs, int first,
                                    int last, const Types<float>::V* sums) {
    using V = Types<float>::V;
    const WinogradTarget to(a, runs);
    const float* const bias = a.op.bias;
    const int32_t* const order = a.op.order;
    for (int place = first; place < last; ++place, sums += 6 * WIDTH * TILES) {
        const int f[] = {order ? order[place] : place};
        V rows[6][4];
        repeat<6>([&](auto i) FORCED { winograd_row<WIDTH, TILES>(sums + i * WIDTH * TILES, rows[i]); });
        winograd_finish<1>(a.op, runs, to, f, splat(bias[f[0]]),
                           [&](auto i, auto j) FORCED { return rows[i][j]; });
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
    if (parts > 1 && a.vectors() < 2 * parts && a.vectors() % parts) {
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
