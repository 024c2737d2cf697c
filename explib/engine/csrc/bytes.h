// int8: square convolutions by dot products of four bytes.
//
// A word holds four codes of one image that a filter takes at once: neighbouring pixels of a row of
// its kernel (3, 5, 7: of more than there are the weights are zero), of a 1x1 conv neighbouring
// channels, or two of these in 16 bits each. A vector holds the words of one pixel of as many images (byte_blocks.h), or of pixels
// side by side of one (byte_images.h). A tile's words are put together once for all filters; sums
// are exact, in 32 bits.
#pragma once
#include <algorithm>
#include <cstring>

#include "act.h"
#include "plan.h"
#include "vectors.h"

namespace {

using Words = Types<float>::Words;
constexpr int BYTE_LANES = Types<float>::lanes;
constexpr int FEW_BYTES = 32 * 1024;   // of the first cache, for the words of a tile
constexpr int WORDS_BYTES = 48 * 1024;  // of the second, where that spares a 3x3 conv its chunks
constexpr int BYTE_SUMS_BYTES = 128 * 1024;  // and for sums that wait for more channels
// Registers hold the sums of a tile, of 32 vectors or 16
constexpr int WIDE = VECTOR_BYTES == 64 || TILE_H == 4 ? 2 : 1;

typedef uint8_t Bytes __attribute__((vector_size(BYTE_LANES), may_alias, aligned(1)));

// sum + the dot products of four codes and four weights, word by word. Pairs of weights are such
// that none leaves 16 bits (quantization.py)
FORCED inline Words add_dots(Words sum, Words codes, Words weights) {
#if defined(__AVX512VNNI__)
    return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)weights);
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)weights);
    return sum + (Words)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__)
    return (Words)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)weights);
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)weights);
    return sum + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (Words)vusdotq_s32((int32x4_t)sum, (uint8x16_t)codes, (int8x16_t)weights);
#elif defined(__ARM_FEATURE_DOTPROD)  // of signed bytes: codes less 128, and so much back
    const int8x16_t kernels = (int8x16_t)weights, signs = vdupq_n_s8(-128);
    const int32x4_t less = vdotq_s32(int32x4_t{}, signs, kernels);
    return (Words)(vdotq_s32((int32x4_t)sum, (int8x16_t)codes ^ signs, kernels) - less);
#else
    typedef int16_t Pairs __attribute__((vector_size(VECTOR_BYTES), may_alias));
    const Pairs x = (Pairs)codes, w = (Pairs)weights;
    const Words pairs = (Words)((x & 255) * (w << 8 >> 8) + (x >> 8 & 255) * (w >> 8));
    return sum + (pairs << 16 >> 16) + (pairs >> 16);
#endif
}

#if defined(__AVX512F__)
// Bytes of four pixels, one after the other, to those of each image
FORCED inline Words by_image(__m512i all) {
#if defined(__AVX512VBMI__)
    alignas(64) static constexpr auto ORDER = [] {
        struct {
            uint8_t at[64];
        } order{};
        for (int i = 0; i < 64; ++i) order.at[i] = uint8_t(i % 4 * 16 + i / 4);
        return order;
    }();
    return (Words)_mm512_permutexvar_epi8(_mm512_load_si512(&ORDER), all);
#else
    const __m512i words =
        _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    return (Words)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, all), bytes);
#endif
}
#elif defined(__AVX2__)
FORCED inline Words by_image(__m256i all) {
    const __m256i words = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    return (Words)_mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(all, words), bytes);
}
#elif defined(__aarch64__)
FORCED inline Words by_image(uint8x16_t all) {
    return (Words)vqtbl1q_u8(all, (uint8x16_t){0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
}
#endif

// The codes of four pixels, those of each image in a word
FORCED inline Words quads(const Byte* a, const Byte* b, const Byte* c, const Byte* d) {
#if defined(__AVX512F__)
    __m512i all = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)a));
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i*)b), 1);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i*)c), 2);
    return by_image(_mm512_inserti32x4(all, _mm_loadu_si128((const __m128i*)d), 3));
#elif defined(__AVX2__)
    const auto eight = [](const Byte* at) { return _mm_loadl_epi64((const __m128i*)at); };
    const __m128i ab = _mm_unpacklo_epi8(eight(a), eight(b));
    const __m128i cd = _mm_unpacklo_epi8(eight(c), eight(d));
    return (Words)_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(ab, cd)),
                                          _mm_unpackhi_epi16(ab, cd), 1);
#elif defined(__aarch64__)
    int32_t all[4];
    const Byte* from[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) std::memcpy(all + i, from[i], 4);
    return by_image(vreinterpretq_u8_s32(vld1q_s32(all)));
#else
    Words made = {};
    const Byte* from[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        made |= __builtin_convertvector(*(const Bytes*)from[i], Words) << (8 * i);
    return made;
#endif
}

// The same of four neighbouring ones
FORCED inline Words quads(const Byte* at) {
#if defined(__AVX512F__)
    return by_image(_mm512_loadu_si512(at));
#elif defined(__AVX2__)
    return by_image(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__aarch64__)
    return by_image(vld1q_u8(&at->bits));
#else
    return quads(at, at + BYTE_LANES, at + 2 * BYTE_LANES, at + 3 * BYTE_LANES);
#endif
}

// `quads` of pixels `at` to `at` + 3 of a row of blocks of images, of which as many as `last` + 1 have
// weights; `outside`: what lies beyond the row. Where it ends: a call, for which little code is enough
[[gnu::noinline]] inline Words quads_at_end(const Byte* row, int width, int at, int last,
                                            const Byte* outside) {
    const auto pixel = [&](int i) {
        const int x = at + std::min(i, last);
        return x >= 0 && x < width ? row + x * BYTE_LANES : outside;
    };
    return quads(pixel(0), pixel(1), pixel(2), pixel(3));
}
FORCED inline Words quads_of_row(const Byte* row, int width, int at, int last,
                                 const Byte* outside) {
    // the fourth pixel may be any that is in memory
    if (at >= 0 && at + last < width && at + 3 <= width) return quads(row + at * BYTE_LANES);
    return quads_at_end(row, width, at, last, outside);
}

// ---- Words of 1x1 convs: how many channels they hold, their products, and those at `at` of some
// channels. With AVX2 alone the products of four bytes are two instructions and those of two halves
// one; and where most kernels are left out, half of the pairs are empty, but few of the fours
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512BW__)
constexpr int POINT_CODES = 2;
FORCED inline Words add_point(Words sum, Words codes, Words weights) {
    return sum + (Words)_mm256_madd_epi16((__m256i)codes, (__m256i)weights);
}
FORCED inline Words point_words(const Byte* const* from, int64_t at) {
    const __m128i a = _mm_loadl_epi64((const __m128i*)(from[0] + at));
    const __m128i b = _mm_loadl_epi64((const __m128i*)(from[1] + at));
    return (Words)_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
}
#else
constexpr int POINT_CODES = 4;
FORCED inline Words add_point(Words sum, Words codes, Words weights) {
    return add_dots(sum, codes, weights);
}
FORCED inline Words point_words(const Byte* const* from, int64_t at) {
    return quads(from[0] + at, from[1] + at, from[2] + at, from[3] + at);
}
#endif

// Values of a filter's outputs to their codes, with an activation that is more than bounds. other:
// null, or what is added
[[gnu::noinline]] inline void end_values(const Op& op, int f, Types<float>::V* values, int count,
                                         const Byte* other, const int64_t* at) {
    for (int i = 0; other && i < count; ++i)
        values[i] += decoded<Byte>(load(other + at[i]), op.other_code);
    activate_any(values, count, op.act, op.act == PRELU ? op.slope[f] : op.alpha);
    for (int i = 0; i < count; ++i) values[i] = coded<Byte>(values[i], op.out_code);
}

// N vectors of a filter's sums to codes of its outputs: vector i is at at(i) of `other`, which is
// added unless it is null, and put(i, codes) stores it
template <int N, class At, class Put>
FORCED inline void end_sums(const Op& op, int f, const Words* sums, const Byte* other,
                            const At& at, const Put& put) {
    using V = Types<float>::V;
    const float scale = op.byte_scale[f], bias = op.byte_bias[f];
    V made[N];
    const auto each = [&](auto change) FORCED {
#pragma GCC unroll 64
        for (int i = 0; i < N; ++i) change(made[i], __builtin_convertvector(sums[i], V), at(i));
    };
    if (op.act > CLAMP) {
        V values[N];
        int64_t where[N];
        for (int i = 0; i < N; ++i) {
            values[i] = __builtin_convertvector(sums[i], V) * scale + bias;
            where[i] = at(i);
        }
        end_values(op, f, values, N, other, where);
        for (int i = 0; i < N; ++i) put(i, values[i]);
        return;
    }
    // in units of the outputs' codes, all of it, of which no more than 0 to 255 are stored
    const float unit = 1 / op.out_code.scale, zero = op.out_code.zero;
    const float least = op.act == RELU ? zero : op.act ? op.alpha * unit + zero : 0;
    const float most = op.act == CLAMP ? op.beta * unit + zero : 255;
    const float factor = scale * unit, beside = op.other_code.scale * unit;
    const float shift = bias * unit + zero;
    if (other) {
        const float start = shift - beside * op.other_code.zero;
        each([&](V& value, V sum, int64_t at) FORCED {
            value = sum * factor + (load(other + at) * beside + start);
        });
    } else {
        each([&](V& value, V sum, int64_t) FORCED { value = sum * factor + shift; });
    }
    if (least > 0)
        each([&](V& value, V, int64_t) FORCED { value = at_least(value, V{} + least); });
    if (most < 255)
        each([&](V& value, V, int64_t) FORCED { value = at_most(value, V{} + most); });
#pragma GCC unroll 64
    for (int i = 0; i < N; ++i) put(i, made[i]);
}

// The kernels of a conv as words, by chunk and in that by filter, or by group of filters
struct ByteLists {
    const int32_t *weight, *start, *index;
};

// TH x TW vectors of outputs of a conv, of which Layout knows where they are:
//   pack<Tile>(words, y, x, first, channels)  puts the words of so many channels together
//   end<Tile>(sums, f, y, x)                  makes outputs of a filter's sums
// K: 1, 3, 5 or 7; S: the stride; 0: every vector of outputs has K rows of words of its own, and x
// counts them; M: filters at once, for which a word is loaded once
template <class Layout, int K_, int S_, int TH_, int TW_, int M_ = 1>
struct ByteTile {
    static constexpr int K = K_, S = S_, TH = TH_, TW = TW_, M = M_;
    static constexpr int Q = (K + 3) / 4;  // words of a row of a kernel
    static constexpr int IH = S ? (TH - 1) * S + K : K * TH, WORDS = IH * TW * Q;
    static constexpr int ITEM = K == 1 ? POINT_CODES : 1;  // channels whose words lie together
    // Channels of a chunk, for which the words of a tile lie in the cache at once
    static constexpr int chunk(int channels) {
        constexpr int each = WORDS * VECTOR_BYTES;
        if (K > 1 && channels * each <= WORDS_BYTES) return channels;
        return std::max(1, FEW_BYTES / each) * ITEM;
    }
    static constexpr int FILTERS = BYTE_SUMS_BYTES / (TH * TW * VECTOR_BYTES) / M * M;
    // The row of outputs that row i of the words serves with row ky of a kernel, or -1
    static constexpr int row(int i, int ky) {
        constexpr int step = S ? S : 1;
        if (!S) return i / TH == ky ? i % TH : -1;
        const int dy = i - ky;
        return dy >= 0 && dy % step == 0 && dy / step < TH ? dy / step : -1;
    }

    const Layout& a;
    Words* words;

    // What filters make of the words of chunk h; `ends` says that it is the last one
    void add(int y, int x, int h, bool ends, int first, int last, Words* sums) const {
        constexpr int N = TH * TW, SETS = M * N >= 7 ? 1 : 8 / (M * N);
        const ByteLists& lists = a.lists;
        const int32_t* start = lists.start + int64_t(h) * ((a.filters + M - 1) / M);
        for (int f = first; f < last; f += M, sums += M * N) {
            int k = start[f / M];
            const int end = start[f / M + 1];
            if (k == end && h && !ends) continue;
            Words acc[SETS][M][N] = {};
            if (h) repeat<M * N>([&](auto i) FORCED { acc[0][i / N][i % N] = sums[i]; });
            const auto one = [&](Words(&sum)[M][N], int k) FORCED {
                const Words* from = words + int64_t(lists.index[k]) * WORDS;
                const int32_t* w = lists.weight + int64_t(k) * K * Q * M;
                repeat<Q>([&](auto q) FORCED {
                    Words weights[K][M];
#pragma GCC unroll 64
                    for (int i = 0; i < K * M; ++i)
                        weights[i / M][i % M] = Words{} + w[(i / M * Q + q) * M + i % M];
#pragma GCC unroll 4096
                    for (int n = 0; n < IH * TW * K * M; ++n) {
                        const int i = n / (TW * K * M), t = n / (K * M) % TW, ky = n % (K * M) / M;
                        const int m = n % M, r = row(i, ky);
                        if (r < 0) continue;
                        const Words codes = from[(i * TW + t) * Q + q];
                        Words& made = sum[m][r * TW + t];
                        made = K == 1 ? add_point(made, codes, weights[ky][m])
                                      : add_dots(made, codes, weights[ky][m]);
                    }
                });
            };
            for (; k + SETS <= end; k += SETS)
                repeat<SETS>([&](auto s) FORCED { one(acc[s], k + s); });
            if constexpr (SETS > 1) {
                for (; k < end; ++k) one(acc[0], k);
                repeat<(SETS - 1) * M * N>([&](auto i) FORCED {
                    constexpr int at = i % (M * N);
                    acc[0][at / N][at % N] += acc[i / (M * N) + 1][at / N][at % N];
                });
            }
            if (!ends) {
                repeat<M * N>([&](auto i) FORCED { sums[i] = acc[0][i / N][i % N]; });
                continue;
            }
            repeat<M>([&](auto m) FORCED {
                if (M == 1 || f + m < a.filters) a.template end<ByteTile>(acc[0][m], f + m, y, x);
            });
        }
    }

    // Chunks of `size` channels, as the lists have them
    void run(int y, int x, int size) const {
        const int chunks = (a.channels + size - 1) / size;
        Words* sums = words + WORDS_BYTES / VECTOR_BYTES;
        for (int first = a.first; first < a.last; first += chunks > 1 ? FILTERS : a.last) {
            const int last = chunks > 1 ? std::min(first + FILTERS, a.last) : a.last;
            for (int h = 0; h < chunks; ++h) {
                const int channels = std::min(size, a.channels - h * size);
                a.template pack<ByteTile>(words, y, x, h * size, channels);
                add(y, x, h, h + 1 == chunks, first, last, sums);
            }
        }
    }
};

// Filters at once of a 1x1 conv most of whose words have weights: what fits in 32 registers
constexpr int POINT_FILTERS = VECTOR_BYTES == 64 || TILE_H == 4 ? 4 : 1;
// Vectors of a tile then, and of one filter's: with products of one instruction all but three of 16
// registers hold sums
constexpr int POINT_TILE = POINT_FILTERS > 1 ? 6 : 8;
constexpr int POINT_ROW = WIDE == 2 ? 14 : POINT_CODES == 2 ? 13 : 8;

// with(tile): a tile for `left` vectors of the outputs of a 1x1 conv, as an empty ByteTile's type
template <class Layout, int S, class With>
inline int with_point_tile(int together, int left, const With& with) {
    const auto of = [&](auto n) FORCED {
        if constexpr (n <= POINT_TILE) if (together > 1)
            return with((ByteTile<Layout, 1, S, n, 1, POINT_FILTERS>*)nullptr);
        return with((ByteTile<Layout, 1, S, n, 1>*)nullptr);
    };
    if (together > 1 || POINT_CODES == 2) {  // tiles of about one size
        const int most = together > 1 ? POINT_TILE : POINT_ROW, tiles = (left + most - 1) / most;
        left = (left + tiles - 1) / tiles;
    }
    if (WIDE == 2 && left >= 14) return of(Int<14>{});
    if (POINT_ROW >= 13 && left == 13) return of(Int<13>{});
    if (POINT_CODES == 2 && left == 12) return of(Int<12>{});
    if (POINT_CODES == 2 && left >= 10) return of(Int<10>{});
    if (left >= 8) return of(Int<8>{});
    if (left == 7) return of(Int<7>{});
    if (left == 6 && (together > 1 || POINT_CODES == 2)) return of(Int<6>{});
    if (left == 5 && together > 1) return of(Int<5>{});
    if (left >= 4) return of(Int<4>{});
    if (left == 3 && together > 1) return of(Int<3>{});
    return left >= 2 ? of(Int<2>{}) : of(Int<1>{});
}

// Channels of a chunk of a 1x1 conv with so many vectors of outputs: as many as every tile of these
// has room for
template <class Layout>
inline int byte_point_chunk(int together, int vectors, int channels) {
    const int most = together > 1 ? POINT_TILE : POINT_ROW;
    return with_point_tile<Layout, 0>(together, std::min(vectors, most), [&](auto* tile) {
        return std::remove_pointer_t<decltype(tile)>::chunk(channels);
    });
}

}  // namespace
