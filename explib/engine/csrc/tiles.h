// What convolutions of blocks of images share, [C][H][W][lanes]: tiles of outputs, and how they end.
#pragma once
#include <algorithm>

#include "act.h"
#include "plan.h"
#include "vectors.h"

namespace {

constexpr int CACHE_SKEW = 6;  // lines

// Planes of a multiple of 4 KiB would all fall on the same few lines of the first cache
inline int64_t block_plane(int height, int width) {
    const int64_t pixels = int64_t(height) * width;
    return pixels % 64 ? pixels : pixels + CACHE_SKEW;
}
template <class T>
struct ConvBlock {
    const T* in;
    const T* other;  // added to the outputs, or null
    T* out;
    int first, last;  // the filters to compute
    int height, width, out_height, out_width;
    const Op& op;
    const int32_t* weight;
    const int32_t *start, *order;
    const void* index;  // int32_t, of a 1x1 conv uint8_t
};

template <class V, int TH, int TW>
FORCED inline void start_from(V bias, V (&acc)[TH][TW]) {
    repeat<TH>([&](auto r) FORCED { repeat<TW>([&](auto c) FORCED { acc[r][c] = bias; }); });
}

// Where output (y, x) of filter f begins
template <class T>
FORCED inline int64_t place_in_block(const ConvBlock<T>& a, int f, int y, int x) {
    const int64_t pixel = int64_t(y) * a.out_width + x;
    return (f * block_plane(a.out_height, a.out_width) + pixel) * Types<T>::lanes;
}

template <class T, int TH, int TW>
FORCED inline void finish(const ConvBlock<T>& a, int f, int y, int x,
                          typename Types<T>::V (&acc)[TH][TW]) {
    USE_TYPES;
    const int64_t width = int64_t(a.out_width) * LANES;  // of a row; stores might change `a`
    const int64_t first = place_in_block<T>(a, f, y, x);
    const auto each = [&](auto* at, auto change) FORCED {
        repeat<TH>([&](auto r) FORCED {
            auto* row = at + first + r * width;
            repeat<TW>([&](auto c) FORCED { change(acc[r][c], row + c * LANES); });
        });
    };
    if (a.other) each(a.other, [&](V& sum, const T* at) FORCED { sum += load(at); });
    repeat<TH>([&](auto r) FORCED { activate<TW>(a.op, f, acc[r]); });
    each(a.out, [&](V& sum, T* at) FORCED { store(at, sum); });
}

// The same of a tile's first `rows` and `columns`
template <class T, int TH, int TW>
FORCED inline void finish_part(const ConvBlock<T>& a, int f, int y, int x, int rows, int columns,
                               typename Types<T>::V (&acc)[TH][TW]) {
    USE_TYPES;
    if (rows >= TH && columns >= TW) return finish<T, TH, TW>(a, f, y, x, acc);
    for (int i = 0; i < std::min(rows, TH); ++i)
        for (int j = 0; j < std::min(columns, TW); ++j) {
            V one[1][1] = {{acc[i][j]}};
            finish<T, 1, 1>(a, f, y + i, x + j, one);
        }
}

// What `finish` will add, into the nearest cache
template <int TH, int TW, class T>
FORCED inline void prefetch_other(const ConvBlock<T>& a, int f, int y, int x) {
    if (!a.other) return;
    constexpr int LINE = 64, BYTES = TW * Types<T>::lanes * sizeof(T);
    const auto* at = (const char*)(a.other + place_in_block<T>(a, f, y, x));
    repeat<TH>([&](auto r) FORCED {
        repeat<(BYTES + LINE - 1) / LINE>([&](auto line) FORCED {
            __builtin_prefetch(at + int64_t(r) * a.out_width * (BYTES / TW) + line * LINE);
        });
    });
}

// The tiles of one of `parts` threads, as body(y, x). The last one of a row or column ends with it and
// may overlap the one before, of the same thread: where the outputs are also the residual it must not
template <int TH, int TW, class Body>
FORCED inline void tiles(int height, int width, int part, int parts, const Body& body) {
    const int rows = (height + TH - 1) / TH;
    for (int r = (int)split(rows, part, parts); r < (int)split(rows, part + 1, parts); ++r)
        for (int x = 0; x < width; x += TW)
            body(std::min(r * TH, height - TH), std::min(x, width - TW));
}

}  // namespace
