// Single images of 2 x 2 tiles, where vectors have eight lanes: two points of all tiles fill one.
// Pixels and outputs are transformed as winograd_images.h does, of two channels or filters at once.
#pragma once
#include "winograd_images.h"

namespace {

constexpr bool FOURS = Types<float>::lanes == 8;
constexpr int FOUR_PASSES = 3;  // each of two rows of points, POINT_PAIRS

// Whether a plane goes so: of 5 x 5, the direct way is as fast
inline bool winograd_four(int height, int width) {
    return FOURS && height > 5 && height <= 8 && width > 5 && width <= 8;
}

// In each half of a vector two numbers of a, the first ones or the SECOND, then those of b
template <int SECOND, class V>
FORCED inline V pairs(V a, V b) {
    V made;
    constexpr int LANES = sizeof(V) / 4;
#if SHUFFLES
    [&]<int... I>(std::integer_sequence<int, I...>) FORCED {
        made = __builtin_shufflevector(
            a, b, (I / 4 * 4 + SECOND * 2 + I % 2 + I % 4 / 2 * LANES)...);
    }(std::make_integer_sequence<int, LANES>{});
#else
    for (int i = 0; i < LANES; ++i) made[i] = (i % 4 / 2 ? b : a)[i / 4 * 4 + SECOND * 2 + i % 2];
#endif
    return made;
}

// Four weights in each half of a vector, and of those two in each half twice
FORCED inline Types<float>::V four_weights(const float* weight) {
#if defined(__AVX__) && !defined(__AVX512F__)  // the compiler's own has a shuffle more
    return (Types<float>::V)_mm256_broadcast_ps((const __m128*)weight);
#else
    Types<float>::V made;
    for (int i = 0; i < Types<float>::lanes; ++i) made[i] = weight[i % 4];
    return made;
#endif
}
template <int SECOND, class V>
FORCED inline V twice(V four) {
    V made;
    constexpr int LANES = sizeof(V) / 4;
#if SHUFFLES
    [&]<int... I>(std::integer_sequence<int, I...>) FORCED {
        made = __builtin_shufflevector(four, four, (I / 4 * 4 + SECOND * 2 + I % 4 / 2)...);
    }(std::make_integer_sequence<int, LANES>{});
#else
    for (int i = 0; i < LANES; ++i) made[i] = four[i / 4 * 4 + SECOND * 2 + i % 4 / 2];
#endif
    return made;
}

// All channels at the points: [pass][channel][6]
[[gnu::noinline]] inline void winograd_four_in(const WinogradImage& a, Types<float>::V* points) {
    using V = Types<float>::V;
    const int channels = a.source.channels;
    const int64_t pass = (channels + channels % 2) * 6;
    WinogradRuns runs(a, 0, true, a.in_plane);
    for (int c = 0; c < channels; c += 2, points += 12) {
        if (c + 1 == channels) runs = WinogradRuns(a, 0, true);
        V first[6];
        const WinogradPixels pixels(a.in + c * a.in_plane, a.pitch, runs);
        winograd_pixels(pixels, runs, [&](auto i, const V(&row)[6]) FORCED {
            repeat<FOUR_PASSES>([&](auto p) FORCED {
                if constexpr (i == POINT_PAIRS[p][0])
                    repeat<6>([&](auto j) FORCED { first[j] = row[j]; });
                if constexpr (i == POINT_PAIRS[p][1])
                    repeat<6>([&](auto j) FORCED {
                        points[p * pass + j] = pairs<0>(first[j], row[j]);
                        points[p * pass + 6 + j] = pairs<1>(first[j], row[j]);
                    });
            });
        });
    }
}

// Sums of filters at places `first` to `last`: [place][pass][4], in a row already outputs
[[gnu::noinline]] inline void winograd_four_sums(const WinogradImage& a, int first, int last,
                                                 const Types<float>::V* points,
                                                 Types<float>::V* sums) {
    using V = Types<float>::V;
    const int channels = a.source.channels;
    const int64_t kernels = a.op.start[a.made.channels];
    const float* weights = (const float*)a.op.winograd_alone;
    for (int pass = 0; pass < FOUR_PASSES; ++pass) {
        const V* const from = points + pass * int64_t(channels + channels % 2) * 6;
        for (int place = first; place < last; ++place) {
            const int start = a.op.start[place], n = a.op.start[place + 1] - start;
            const int32_t* index = a.op.index + start;
            const float* weight = weights + (pass * kernels + start) * 12;
            V sum[6] = {}, more[6] = {};
            const auto add = [&](V(&sum)[6], int k) FORCED {
                const V* x = from + int64_t(index[k]) * 6;
                __builtin_prefetch((const char*)(weight + k * 12) + PREFETCH);
                repeat<3>([&](auto j) FORCED {
                    const V four = four_weights(weight + k * 12 + j * 4);
                    sum[2 * j] += x[2 * j] * twice<0>(four);
                    sum[2 * j + 1] += x[2 * j + 1] * twice<1>(four);
                });
            };
            int k = 0;
            for (; k + 2 <= n; k += 2) add(sum, k), add(more, k + 1);
            if (k < n) add(sum, k);
            repeat<6>([&](auto j) FORCED { sum[j] += more[j]; });
            V made[4];
            winograd_gather(sum, made);
            V* to = sums + ((place - first) * FOUR_PASSES + pass) * 4;
            repeat<4>([&](auto j) FORCED { to[j] = made[j]; });
        }
    }
}

// The outputs of two filters at a time
[[gnu::noinline]] inline void winograd_four_out(const WinogradImage& a, int first, int last,
                                                const Types<float>::V* sums) {
    using V = Types<float>::V;
    const WinogradRuns runs(a, 0, true);
    const WinogradTarget to(a, runs);
    for (int place = first; place < last; place += 2, sums += 2 * FOUR_PASSES * 4) {
        const int second = std::min(place + 1, last - 1);
        const int f[] = {a.op.order ? a.op.order[place] : place,
                         a.op.order ? a.op.order[second] : second};
        const V* const others = sums + (second - place) * FOUR_PASSES * 4;
        const V bias = pairs<0>(splat(a.op.bias[f[0]]), splat(a.op.bias[f[1]]));
        winograd_finish<2>(a.op, runs, to, f, bias, [&](auto i, auto j) FORCED {
            constexpr int PASS = i == 0 || i == 5 ? 0 : (i + 1) / 2;
            return pairs<i == POINT_PAIRS[PASS][1]>(sums[PASS * 4 + j], others[PASS * 4 + j]);
        });
    }
}

// Threads share the filters
inline void winograd_fours(const WinogradImage& a, Types<float>::V* memory, int part, int parts) {
    const int first = parts > 1 ? a.op.share[part] : 0;
    const int last = parts > 1 ? a.op.share[part + 1] : a.made.channels;
    Types<float>::V* sums = memory + FOUR_PASSES * 6 * int64_t(a.source.channels + 1);
    winograd_four_in(a, memory);
    winograd_four_sums(a, first, last, memory, sums);
    winograd_four_out(a, first, last, sums);
}

}  // namespace
