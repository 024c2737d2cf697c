// Blocks of images by Winograd's way along columns alone, F(4, 3): four outputs below each other come
// of 6 x 3 products a kernel instead of 36. Where registers are few, this is faster than 36 for 16
// outputs until many kernels share the transforms: those cost half.
#pragma once
#include <algorithm>

#include "tiles.h"
#include "winograd.h"

namespace {

constexpr int STEP = 4;         // columns of outputs at once
constexpr int RING = 2 * STEP;  // columns of points that are held; a step reads STEP + 2
constexpr int PER_HALF = 3;     // points at once, so that STEP * PER_HALF sums stay in registers

// The points of the columns FIRST .. FIRST + COUNT - 1 of the step at (y, x), which has those from -1
// on: [half][channel][RING][PER_HALF]. What lies outside the image is zero
template <int PHASE, int FIRST, int COUNT, class T>
void winograd_columns_in(const ConvBlock<T>& a, int channels, int y, int x,
                         typename Types<T>::V* points) {
    USE_TYPES;
    static const V zeros[STEP] = {};
    const int64_t plane = block_plane(a.height, a.width), width = a.width;
    const int64_t half = int64_t(channels) * RING * PER_HALF;
    const V* from = (const V*)a.in + int64_t(y - 1) * width + x + FIRST;
    const int live = int(width) - x - FIRST;
    for (int c = 0; c < channels; ++c, from += plane, points += RING * PER_HALF) {
        const V* rows[6];
        repeat<6>([&](auto i) FORCED {
            const bool inside = y - 1 + i >= 0 && y - 1 + i < a.height;
            rows[i] = inside ? from + i * width : zeros;
        });
        repeat<COUNT>([&](auto j) FORCED {
            V in[6], out[6] = {};
            if (FIRST + j >= 0 && j < live) {
                repeat<6>([&](auto i) FORCED { in[i] = rows[i][j]; });
                winograd_spread(in, out);
            }
            V* to = points + (PHASE * STEP + FIRST + 1 + j) % RING * PER_HALF;
            repeat<PER_HALF>([&](auto i) FORCED { to[i] = out[i], to[half + i] = out[PER_HALF + i]; });
        });
    }
}

// Half of the points' sums of a filter, its n kernels summed
template <int PHASE, class V>
FORCED inline void winograd_columns_points(const float* weight, const int32_t* index, int n,
                                           const V* points, V (&sums)[PER_HALF][STEP]) {
    for (int k = 0; k < n; ++k, weight += 3 * PER_HALF) {
        const V* from = points + int64_t(index[k]) * RING * PER_HALF;
        repeat<PER_HALF>([&](auto p) FORCED {
            V taps[3];
            repeat<3>([&](auto j) FORCED { taps[j] = splat(weight[j * PER_HALF + p]); });
            repeat<STEP + 2>([&](auto u) FORCED {
                V column = from[(PHASE * STEP + u) % RING * PER_HALF + p];
                if constexpr (u > 0 && u < STEP + 1) keep(column);
                repeat<3>([&](auto j) FORCED {
                    if constexpr (u - j >= 0 && u - j < STEP) sums[p][u - j] += column * taps[j];
                });
            });
        });
    }
}

// The step's outputs of all filters. sums: of the first half of the points, [place][STEP][3]
template <int PHASE, class T>
void winograd_columns_out(const ConvBlock<T>& a, int channels, int filters, int y, int x,
                          const typename Types<T>::V* points, typename Types<T>::V* sums) {
    USE_TYPES;
    const int32_t* index = (const int32_t*)a.index;
    const auto summed = [&](int half, int place, V(&made)[PER_HALF][STEP]) FORCED {
        const int start = a.start[place], n = a.start[place + 1] - start;
        const auto weight = (const float*)a.op.winograd_columns;
        const int64_t kernels = half * int64_t(a.start[filters]) + start;
        winograd_columns_points<PHASE>(weight + kernels * 3 * PER_HALF, index + start, n,
                                       points + half * int64_t(channels) * RING * PER_HALF, made);
    };
    for (int place = a.first; place < a.last; ++place) {
        V made[PER_HALF][STEP] = {};
        summed(0, place, made);
        V* to = sums + int64_t(place) * 3 * STEP;
        repeat<STEP>([&](auto j) FORCED {
            const V sum = made[1][j] + made[2][j];
            to[j * 3] = made[0][j] + sum, to[j * 3 + 1] = sum, to[j * 3 + 2] = made[1][j] - made[2][j];
        });
    }
    for (int place = a.first; place < a.last; ++place) {
        const int f = a.order ? a.order[place] : place;
        prefetch_other<4, STEP>(a, f, y, x);
        V made[PER_HALF][STEP] = {};
        summed(1, place, made);
        const V* from = sums + int64_t(place) * 3 * STEP;
        const V bias = splat(T(a.op.bias[f]));
        V out[4][STEP];
        repeat<STEP>([&](auto j) FORCED {  // as winograd_gather
            const V sum = made[0][j] + made[1][j], apart = made[0][j] - made[1][j];
            out[0][j] = sum + (from[j * 3] + bias);
            out[1][j] = POINT_B * apart + (POINT_A * from[j * 3 + 2] + bias);
            out[2][j] = 2.0f * sum + (0.5f * from[j * 3 + 1] + bias);
            out[3][j] = 2.0f * POINT_B * apart +
                        (0.5f * POINT_A * from[j * 3 + 2] + (made[2][j] + bias));
        });
        finish_part<T>(a, f, y, x, a.out_height - y, a.out_width - x, out);
    }
}

// Threads share the rows of tiles, or the filters where those are few
template <class T>
void winograd_columns(ConvBlock<T> a, int channels, typename Types<T>::V* memory, int part,
                      int parts) {
    const int filters = a.last, all = (a.height + 3) / 4;
    if (all < 4 * parts && all % parts) {
        a.first = a.op.share[part], a.last = a.op.share[part + 1];
        part = 0, parts = 1;
    }
    auto* sums = memory + int64_t(channels) * RING * 2 * PER_HALF;
    for (int tile = (int)split(all, part, parts); tile < (int)split(all, part + 1, parts); ++tile) {
        winograd_columns_in<0, -1, 2>(a, channels, tile * 4, 0, memory);
        const auto step = [&](auto phase, int x) FORCED {
            winograd_columns_in<phase, 1, STEP>(a, channels, tile * 4, x, memory);
            winograd_columns_out<phase>(a, channels, filters, tile * 4, x, memory, sums);
        };
        for (int x = 0; x < a.width; x += STEP)
            if (x % RING) step(Int<1>{}, x); else step(Int<0>{}, x);
    }
}

}  // namespace
