// 3x3 convolutions of single images of 2 x 2 pixels: a kernel makes sixteen products there, one for
// each pair of an output and a pixel, where the planes' way would fill vectors with four outputs.
#pragma once
#include "planes.h"

namespace {

constexpr int TINY_PAIRS = 16;

inline bool is_tiny(const Op& op, const Tensor& in, const Tensor& out) {
    return is_plain(op, in, out) && op.rows.kernel == 3 && op.rows.stride == 1 && in.height == 2 &&
           in.width == 2;
}

// The tap by which output `pair` / 4 takes pixel `pair` % 4
constexpr int tiny_tap(int pair) {
    return (pair % 4 / 2 - pair / 8 + 1) * 3 + pair % 2 - pair / 4 % 2 + 1;
}

// The taps of the `part`th vector of pairs, of a kernel of nine
template <int part>
FORCED inline Types<float>::V tiny_weights(const float* kernel) {
    using V = Types<float>::V;
    constexpr int LANES = Types<float>::lanes, first = part * LANES;
    Types<float>::Words taps;
    repeat<LANES>([&](auto i) FORCED { taps[int(i)] = tiny_tap(first + i); });
#if defined(__AVX512F__)
    return (V)_mm512_permutexvar_ps((__m512i)taps, _mm512_maskz_loadu_ps(0x1ff, kernel));
#elif defined(__AVX2__)  // the upper outputs need the last six taps, the lower ones the first six
    const __m256 loaded = _mm256_loadu_ps(kernel + 1 - part);
    return (V)_mm256_permutevar8x32_ps(loaded, (__m256i)(taps - (1 - part)));
#else
    V weights;
    repeat<LANES>([&](auto i) FORCED { weights[int(i)] = kernel[tiny_tap(first + i)]; });
    return weights;
#endif
}

// Filters from `first` to `last`, by their places; memory: TINY_PAIRS floats a channel
inline void tiny(const ImageConv<float>& a, int first, int last, float* memory) {
    using V = Types<float>::V;
    constexpr int PARTS = TINY_PAIRS / Types<float>::lanes, SETS = 4 / PARTS;  // four sums at once
    const int at[4] = {0, 1, a.pitch, a.pitch + 1};
    for (int c = 0; c < a.source.channels; ++c)
        for (int i = 0; i < TINY_PAIRS; ++i)
            memory[c * TINY_PAIRS + i] = a.in[c * a.in_plane + at[i % 4]];
    for (int place = first; place < last; ++place) {
        V acc[SETS][PARTS] = {};
        const auto add = [&](V(&sum)[PARTS], int k) FORCED {
            const float* w = (const float*)a.op.weight + int64_t(k) * 9;
            const V* x = (const V*)memory + int64_t(a.op.index[k]) * PARTS;
            repeat<PARTS>([&](auto i) FORCED { sum[i] += x[i] * tiny_weights<i>(w); });
        };
        int k = a.op.start[place];
        const int end = a.op.start[place + 1], f = a.op.order ? a.op.order[place] : place;
        for (; k + SETS <= end; k += SETS)
            repeat<SETS>([&](auto s) FORCED { add(acc[s], k + s); });
        for (; k < end; ++k) add(acc[0], k);
        repeat<SETS - 1>([&](auto s) FORCED {
            repeat<PARTS>([&](auto i) FORCED { acc[0][i] += acc[s + 1][i]; });
        });
        const float* sums = (const float*)acc[0];
        V made = {};
        for (int p = 0; p < 4; ++p) {
            const float* sum = sums + 4 * p;
            made[p] = (sum[0] + sum[1]) + (sum[2] + sum[3]) + a.op.bias[f];
            if (a.other) made[p] += a.other[f * a.out_plane + at[p]];
        }
        activate<1>(a.op, f, &made);
        for (int p = 0; p < 4; ++p) a.out[f * a.out_plane + at[p]] = made[p];
    }
}

}  // namespace
