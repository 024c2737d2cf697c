// int8: 3x3 convolutions of single images of 2 x 2 pixels. The four codes of a channel are one word,
// which every output multiplies by four weights: a kernel is four words, one for each output, and a
// vector holds those of as many kernels as fit.
#pragma once
#include "bytes.h"
#include "planes.h"

namespace {

// Kernels of a vector, or 0 where dot products of any four weights leave 16 bits on their way
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8) || \
    defined(__ARM_FEATURE_DOTPROD)
constexpr int TINY_KERNELS = BYTE_LANES / 4;
#else
constexpr int TINY_KERNELS = 0;
#endif

// Filters `first` to `last`; memory: four words a channel
inline void byte_tiny(const ImageConv<Byte>& a, int first, int last, int32_t* memory) {
    using V = Types<float>::V;
    constexpr int SETS = 4, KERNELS = TINY_KERNELS > 0 ? TINY_KERNELS : 1;
    const Op& op = a.op;
    for (int c = 0; c < a.source.channels; ++c)
        for (int i = 0; i < 4; ++i) std::memcpy(memory + 4 * c + i, a.in + c * a.in_plane, 4);
    const int32_t *weight = (const int32_t*)op.flat_weight, *index = op.flat_index;
    const auto codes = [&](int k) FORCED -> Words {
        const auto of = [&](int i) FORCED { return memory + 4 * index[k + i]; };
#if defined(__AVX512F__)
        const auto four = [&](int i) FORCED { return _mm_load_si128((const __m128i*)of(i)); };
        __m512i all = _mm512_castsi128_si512(four(0));
        all = _mm512_inserti32x4(all, four(1), 1);
        all = _mm512_inserti32x4(all, four(2), 2);
        return (Words)_mm512_inserti32x4(all, four(3), 3);
#elif defined(__AVX2__)
        const auto four = [&](int i) FORCED { return _mm_load_si128((const __m128i*)of(i)); };
        return (Words)_mm256_set_m128i(four(1), four(0));
#else
        return Words{} + *of(0);
#endif
    };
    for (int f = first; f < last; ++f) {
        Words acc[SETS] = {};
        const auto add = [&](Words& sum, int k) FORCED {
            const int32_t* w = weight + int64_t(k) * 4;
            __builtin_prefetch((const char*)w + PREFETCH);
            typedef int32_t Loose __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
            sum = add_dots(sum, codes(k), (Words)*(const Loose*)w);
        };
        int k = op.flat_start[f];
        const int end = op.flat_start[f + 1];  // a whole number of vectors from the start
        for (; k + SETS * KERNELS <= end; k += SETS * KERNELS)
            repeat<SETS>([&](auto s) FORCED { add(acc[s], k + s * KERNELS); });
        for (; k < end; k += KERNELS) add(acc[0], k);
        const Words all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        const int32_t* sums = (const int32_t*)&all;
        V value = {};
        for (int p = 0; p < 4; ++p) {
            int32_t sum = 0;
            for (int i = p; i < BYTE_LANES; i += 4) sum += sums[i];
            value[p] = float(sum) * op.byte_scale[f] + op.flat_bias[4 * f + p];
            if (a.other)
                value[p] += decoded<Byte>(float(a.other[f * a.out_plane + p]), op.other_code);
        }
        activate<1>(op, f, &value);
        value = coded<Byte>(value, op.out_code);
        Byte made[BYTE_LANES];
        store(made, value);
        std::memcpy(a.out + f * a.out_plane, made, 4);
    }
}

}  // namespace
