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

constexpr int POINTS = 14, FEW = 7;  // vectors of a tile: at most, and where a cache decides
constexpr int SUMS_BYTES = 224 * 1024;  // of the second
constexpr int AT_ONCE = SUMS_BYTES / VECTOR_BYTES / POINTS;  // filters whose sums are there

// Channels of a chunk of floats or halves, where planes have so many vectors: as many as leave room
// for FEW of each, or for all in as few tiles
inline int point_chunk_channels(int vectors) {
    const int tiles = (vectors + FEW - 1) / FEW, each = (vectors + tiles - 1) / tiles;
    return std::min(256, near_bytes() / VECTOR_BYTES / each);  // as many as a byte numbers
}

// Of scalars of this type, where it is so many of floats
template <class T>
int chunk_of(int floats) {
    return std::min(256, floats * VECTOR_BYTES / (Types<T>::lanes * int(sizeof(T))));
}

// Memory of one thread for the tile and the sums
struct PointScratch {
    Memory tile{size_t(near_bytes())}, sums{SUMS_BYTES};
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
[[gnu::noinline]] void point_chunk(const Points<T>& a, int h, bool ends, int64_t at) {
    USE_TYPES;
    // enough sums to hide their latency
    constexpr int SETS = VECTOR_BYTES == 64 ? 2 : N >= 8 ? 1 : N >= 4 ? 2 : 4;
    constexpr int CHANNELS = Source<T>::channels, BATCH = 4 / CHANNELS;
    // what stores to `sums` could change for all the compiler knows
    const int32_t *const start = a.start + int64_t(h) * a.filters, *const weight = a.weight;
    const uint8_t* const index = a.index;
    const T* const tile = a.tile;
    V* const all = a.sums;
    const int first = a.first, last = a.last;
    const auto filter = [&](int i) { return a.order ? a.order[int64_t(h) * a.filters + i] : i; };
    for (int i = first; i < last; ++i) {
        int k = start[i];
        const int end = start[i + 1], f = filter(i);
        if (k == end && h && !ends) continue;
        for (int ahead = k; ahead < end; ahead += 16)
            __builtin_prefetch((const char*)(weight + ahead) + PREFETCH);
        __builtin_prefetch((const char*)(index + k) + PREFETCH / 4);
        if (ends) {  // where the next results go
            const T* next = a.out + filter(std::min(i + 1, last - 1)) * a.out_plane + at;
            repeat<N>([&](auto n) FORCED { __builtin_prefetch(next + n * LANES, 1); });
        }
        V* sums = all + int64_t(f - first) * N;
        V acc[SETS][N] = {};
        if (h)
            repeat<N>([&](auto n) FORCED { acc[0][n] = sums[n]; });
        else
            repeat<N>([&](auto n) FORCED {
                acc[0][n] = splat(typename Types<T>::Scalar(a.op->bias[f]));
            });
        const auto add = [&](V(&sum)[N], const auto* channels, int k) FORCED {
            const Source<T> source(tile, channels, N * LANES);
            repeat<N>([&](auto n) FORCED {
                sum[n] = add_product<T>(sum[n], source[n * LANES], weight + k);
            });
        };
        // the numbers of four channels by one load, which the pixels need as well
        for (; k + BATCH <= end; k += BATCH) {
            uint32_t four;
            std::memcpy(&four, index + int64_t(k) * CHANNELS, 4);
            repeat<BATCH>([&](auto b) FORCED {
                uint32_t channels[CHANNELS];
                repeat<CHANNELS>([&](auto c) FORCED {
                    channels[c] = four >> (8 * (b * CHANNELS + c)) & 255;
                });
                add(acc[b % SETS], channels, k + b);
            });
        }
        for (; k < end; ++k) add(acc[0], index + int64_t(k) * CHANNELS, k);
        repeat<SETS - 1>([&](auto s) FORCED {
            repeat<N>([&](auto n) FORCED { acc[0][n] += acc[s + 1][n]; });
        });
        if (ends)
            point_finish<T, N>(a, acc[0], f, at);
        else
            repeat<N>([&](auto n) FORCED { sums[n] = acc[0][n]; });
    }
}

// One tile of all filters
template <class T, int N, class Pack>
void point_tile(const Points<T>& a, int64_t at, const Pack& pack) {
    const int chunk = chunk_of<T>(a.op->chunk);
    for (int h = 0; h * chunk < a.channels; ++h) {
        const int channels = std::min(chunk, a.channels - h * chunk);
        pack(h * chunk, channels, a.tile);
        point_chunk<T, N>(a, h, (h + 1) * chunk >= a.channels, at);
    }
}

// Vectors of a tile, which is in the cache with a chunk of its channels
template <class T>
int tile_vectors(const Op& op, int channels) {
    const int packed = std::min(chunk_of<T>(op.chunk), channels);
    return std::min(POINTS, near_bytes() / (packed * Types<T>::lanes * int(sizeof(T))));
}

// The vectors from `first` to `last` of every plane. gather(vector, vectors) makes what packs a tile
// that starts there: pack(first channel, channels, tile), `vectors` vectors a channel
template <class T, class Gather>
void points(Points<T> a, int first, int last, const Gather& gather) {
    const int most = tile_vectors<T>(*a.op, a.channels), tiles = (last - first + most - 1) / most;
    const int first_filter = a.first, last_filter = a.last;
    // of one chunk the sums are never put aside
    const bool whole = a.channels <= chunk_of<T>(a.op->chunk);
    const int at_once = whole ? last_filter - first_filter : POINTS / most * AT_ONCE;
    for (int i = 0; i < tiles; ++i) {
        const int v = first + (int)split(last - first, i, tiles);
        const int vectors = first + (int)split(last - first, i + 1, tiles) - v;
        const auto pack = gather(v, vectors);
        for (a.first = first_filter; a.first < last_filter; a.first += at_once) {
            a.last = std::min(a.first + at_once, last_filter);
            repeat<POINTS>([&](auto n) FORCED {
                if (vectors == n + 1) point_tile<T, n + 1>(a, int64_t(v) * Types<T>::lanes, pack);
            });
        }
    }
}

}  // namespace
