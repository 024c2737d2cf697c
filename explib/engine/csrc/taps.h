// Convolutions of single images where registers are few: shifted planes packed side by side, as
// pointwise.h packs channels, so that a weight, once broadcast, serves several vectors.
#pragma once
#include <algorithm>
#include <cstring>

#include "plan.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr bool PACKS_TAPS = BESIDE == 1;
constexpr int TAP_VECTORS = 7;  // of a tile

// Channels of a chunk, whose taps stay in the nearest cache; 0: kernels go by channel (planes.h)
inline int tap_chunk_channels(int taps) {
    return PACKS_TAPS ? std::max(1, near_bytes() / (TAP_VECTORS * VECTOR_BYTES * taps)) : 0;
}

// A tile's size in scalars
template <class T>
int64_t taps_tile(int taps) {
    return int64_t(tap_chunk_channels(taps)) * taps * TAP_VECTORS * Types<T>::lanes;
}

// Filters' shares of one chunk: those at the places from `first` to `last`
template <class T, int N>
[[gnu::noinline]] void add_packed(const Op& op, const T* tile, int taps, int filters, int chunk,
                                  int first, int last, T* sums) {
    USE_TYPES;
    const int64_t list = int64_t(chunk) * filters;
    const int32_t *const start = op.plane_start + list, *const order = op.plane_order + list;
    const int32_t *const index = op.plane_index, *const words = (const int32_t*)op.plane_weight;
    for (int i = first; i < last; ++i) {
        V* const sum = (V*)sums + int64_t(order[i]) * N;
        V acc[N];
        repeat<N>([&](auto n) FORCED { acc[n] = sum[n]; });
        for (int k = start[i]; k < start[i + 1]; ++k) {
            const T* x = tile + int64_t(index[k]) * taps * (N * LANES);
            const int32_t *word = words + int64_t(k) * taps, *const end = word + taps;
            __builtin_prefetch((const char*)word + PREFETCH);
            for (; word < end; ++word, x += N * LANES) {
                const V weight = broadcast<T>(word);
                repeat<N>([&](auto n) FORCED { acc[n] += load(x + n * LANES) * weight; });
            }
        }
        repeat<N>([&](auto n) FORCED { sum[n] = acc[n]; });
    }
}

// Sums of N vectors, which are `at` there in a plane, of the filters from `first` to `last`
template <class T, int N>
void packed_vectors(const Op& op, const T* in, const int64_t (&at)[N], int64_t plane, int channels,
                    const int* shift, int filters, int first, int last, T* tile, T* sums) {
    USE_TYPES;
    const int taps = op.rows.kernel * op.columns.kernel;
    for (int f = first; f < last; ++f)
        repeat<N>([&](auto n) FORCED { ((V*)sums)[f * N + n] = splat<T>(T(op.bias[f])); });
    for (int c = 0, chunk = 0; c < channels; ++chunk) {
        T* to = tile;
        for (const int end = std::min(channels, c + op.chunk); c < end; ++c)
            for (int t = 0; t < taps; ++t, to += N * LANES) {
                const T* from = in + c * plane + shift[t];
                repeat<N>([&](auto n) FORCED {
                    store(to + n * LANES, load_loose(from + at[n]));
                });
            }
        add_packed<T, N>(op, tile, taps, filters, chunk, first, last, sums);
    }
}

}  // namespace
