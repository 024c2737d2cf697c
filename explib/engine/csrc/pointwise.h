// Sparse 1x1 convolutions, in both layouts: a matrix (F, C) with few entries times one of pixels.
//
// Tiles of as many vectors of pixels as stay in registers as sums. A chunk of channels of a tile is
// packed side by side, so that it stays in the first cache while every filter takes what it needs of
// it; between chunks the sums wait in scratch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "act.h"
#include "plan.h"
#include "threads.h"
#include "vectors.h"

namespace {

// Vectors of a tile: few of the long ones leave room in the cache for more channels
constexpr int POINTS = VECTOR_BYTES == 64 ? 8 : 14;
constexpr int CHUNK_BYTES = 28 * 1024;   // of the first cache
constexpr int SUMS_BYTES = 224 * 1024;   // of the second
constexpr int AT_ONCE = SUMS_BYTES / VECTOR_BYTES / POINTS;  // filters whose sums are there

constexpr int PREFETCH = 1024;  // bytes of weights ahead, which are used once and in order

// Channels of a chunk
template <class T>
constexpr int chunk() {
    constexpr int channels = CHUNK_BYTES / (POINTS * Types<T>::lanes * int(sizeof(T)));
    return channels < 256 ? channels : 256;  // as many as a byte numbers
}

// Memory of one thread for the tile and the sums
struct PointScratch {
    Memory tile{CHUNK_BYTES}, sums{SUMS_BYTES};
    static void prepare(std::vector<std::unique_ptr<PointScratch>>& all) {
        for (auto& one : all)
            if (!one) one = std::make_unique<PointScratch>();
    }
};

template <class T>
struct Points {
    using V = typename Types<T>::V;
    const T* in;
    const T* other;  // added to the outputs, or null
    T* out;
    int64_t in_plane, out_plane;  // scalars from a channel to the next
    int channels, filters, first, last;  // of the filters those to compute
    const Op* op;
    const int32_t* weight;
    const int32_t *start, *order;  // by chunk, and in that by place: see plan.h
    const uint8_t* index;  // the channel in the chunk
    const V* inside;               // of the plane: zero where the output is, or null
    T* tile;
    V* sums;

    void use(const PointScratch& scratch) {
        tile = (T*)scratch.tile.data;
        sums = (V*)scratch.sums.data;
    }
};

// The last thing done to N vectors of a filter's sums; `at`: the tile's first scalar in its plane
template <class T, int N>
FORCED inline void point_finish(const Points<T>& a, typename Types<T>::V (&acc)[N], int f,
                                int64_t at) {
    USE_TYPES;
    const int64_t row = f * a.out_plane + at;
    if (a.other)
        repeat<N>([&](auto n) FORCED { acc[n] += load(a.other + row + n * LANES); });
    activate<N>(*a.op, f, acc);
    if (a.inside) {
        const V* inside = a.inside + at / LANES;
        repeat<N>([&](auto n) FORCED { acc[n] = inside[n] == V{} ? V{} : acc[n]; });
    }
    repeat<N>([&](auto n) FORCED { store(a.out + row + n * LANES, acc[n]); });
}

// Every filter's share of one chunk
template <class T, int N>
void point_chunk(const Points<T>& a, int h, bool ends, int64_t at) {
    USE_TYPES;
    constexpr int SETS = N >= 8 ? 1 : N >= 4 ? 2 : 4;  // enough sums to hide their latency
    const int32_t* start = a.start + int64_t(h) * a.filters;
    const auto filter = [&](int i) { return a.order ? a.order[int64_t(h) * a.filters + i] : i; };
    for (int i = a.first; i < a.last; ++i) {
        int k = start[i];
        const int end = start[i + 1], f = filter(i);
        if (k == end && h && !ends) continue;
        __builtin_prefetch((const char*)(a.weight + k) + PREFETCH);
        __builtin_prefetch((const char*)(a.index + k) + PREFETCH / 4);
        if (ends) {  // where the next results go
            const T* next = a.out + filter(std::min(i + 1, a.last - 1)) * a.out_plane + at;
            repeat<N>([&](auto n) FORCED { __builtin_prefetch(next + n * LANES, 1); });
        }
        V* sums = a.sums + int64_t(f - a.first) * N;
        V acc[SETS][N] = {};
        if (h)
            repeat<N>([&](auto n) FORCED { acc[0][n] = sums[n]; });
        else
            repeat<N>([&](auto n) FORCED {
                acc[0][n] = splat(typename Types<T>::Scalar(a.op->bias[f]));
            });
        const auto add = [&](V(&sum)[N], int k) FORCED {
            const Source<T> source(a.tile, a.index + int64_t(k) * Source<T>::channels, N * LANES);
            repeat<N>([&](auto n) FORCED {
                sum[n] = add_product<T>(sum[n], source[n * LANES], a.weight + k);
            });
        };
        for (; k + SETS <= end; k += SETS)
            repeat<SETS>([&](auto s) FORCED { add(acc[s], k + s); });
        if constexpr (SETS > 1) {
            for (; k < end; ++k) add(acc[0], k);
            repeat<SETS - 1>([&](auto s) FORCED {
                repeat<N>([&](auto n) FORCED { acc[0][n] += acc[s + 1][n]; });
            });
        }
        if (ends)
            point_finish<T, N>(a, acc[0], f, at);
        else
            repeat<N>([&](auto n) FORCED { sums[n] = acc[0][n]; });
    }
}

// One tile of all filters
template <class T, int N, class Pack>
void point_tile(const Points<T>& a, int64_t at, const Pack& pack) {
    constexpr int CHUNK = chunk<T>();
    for (int h = 0; h * CHUNK < a.channels; ++h) {
        const int channels = std::min(CHUNK, a.channels - h * CHUNK);
        pack(h * CHUNK, channels, a.tile);
        point_chunk<T, N>(a, h, (h + 1) * CHUNK >= a.channels, at);
    }
}

// The vectors from `first` to `last` of every plane. gather(vector, vectors) makes what packs a tile
// that starts there: pack(first channel, channels, tile), `vectors` vectors a channel
template <class T, class Gather>
void points(Points<T> a, int first, int last, const Gather& gather) {
    const int tiles = (last - first + POINTS - 1) / POINTS;
    const int first_filter = a.first, last_filter = a.last;
    for (int i = 0; i < tiles; ++i) {
        const int v = first + (int)split(last - first, i, tiles);
        const int vectors = first + (int)split(last - first, i + 1, tiles) - v;
        const auto pack = gather(v, vectors);
        for (a.first = first_filter; a.first < last_filter; a.first += AT_ONCE) {
            a.last = std::min(a.first + AT_ONCE, last_filter);
            repeat<POINTS>([&](auto n) FORCED {
                if (vectors == n + 1) point_tile<T, n + 1>(a, int64_t(v) * Types<T>::lanes, pack);
            });
        }
    }
}

}  // namespace
