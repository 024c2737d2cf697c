// int8: square convolutions of blocks of images by dot products of four bytes.
//
// A word holds four codes of one image that a filter takes at once: neighbouring pixels of a row of
// its kernel (3, 5, 7: of more than there are the weights are zero), of a 1x1 conv neighbouring
// channels. A tile's words
// are put together once for all filters; sums are exact, in 32 bits.
#pragma once
#include <algorithm>
#include <cstring>

#include "tiles.h"

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
#else
    repeat<4>([&](auto i) FORCED {
        sum += ((codes >> (8 * i)) & 255) * ((weights << (24 - 8 * i)) >> 24);
    });
    return sum;
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
#else
    return quads(at, at + BYTE_LANES, at + 2 * BYTE_LANES, at + 3 * BYTE_LANES);
#endif
}

// K: 1, 3, 5 or 7; S: the stride, which of a 1x1 conv only pack sees
template <int K, int S, int TH, int TW>
struct ByteTile {
    static constexpr int HEIGHT = TH, WIDTH = TW;
    static constexpr int Q = (K + 3) / 4;  // words of a row of a kernel
    static constexpr int IH = (TH - 1) * S + K, WORDS = IH * TW * Q;
    static constexpr int ITEM = K == 1 ? 4 : 1;  // channels whose words lie together
    // Channels of a chunk, for which the words of a tile lie in the cache at once
    static constexpr int chunk(int channels) {
        constexpr int each = WORDS * VECTOR_BYTES;
        if (K > 1 && channels * each <= WORDS_BYTES) return channels;
        return std::max(1, FEW_BYTES / each) * ITEM;
    }
    static constexpr int FILTERS = BYTE_SUMS_BYTES / (TH * TW * VECTOR_BYTES);

    const ConvBlock<Byte>& a;
    Words* words;

    // The words of `channels` channels of the tile at (y, x)
    void pack(int y, int x, int first, int channels) const {
        const int64_t plane = block_plane(a.height, a.width) * BYTE_LANES;
        const Byte* in = a.in + first * plane;
        Words* to = words;
        if constexpr (K == 1) {
            const int stride = a.op.rows.stride * BYTE_LANES;
            for (int c = 0; c < channels; c += 4) {
                const Byte* from[4];  // beyond the last one weights are zero
                for (int i = 0; i < 4; ++i) from[i] = in + std::min(c + i, channels - 1) * plane;
                repeat<TH>([&](auto r) FORCED {
                    repeat<TW>([&](auto t) FORCED {
                        const int64_t at = (int64_t(y + r) * a.width + x + t) * stride;
                        *to++ = quads(from[0] + at, from[1] + at, from[2] + at, from[3] + at);
                    });
                });
            }
            return;
        }
        Byte outside[BYTE_LANES];
        std::memset(outside, int(a.op.in_code.zero), BYTE_LANES);
        const Words none = quads(outside, outside, outside, outside);
        for (int c = 0; c < channels; ++c, in += plane)
            for (int i = 0; i < IH; ++i, to += TW * Q) {
                const int row = y * S - K / 2 + i;
                if (row < 0 || row >= a.height) {
                    repeat<TW * Q>([&](auto t) FORCED { to[t] = none; });
                    continue;
                }
                const Byte* from = in + int64_t(row) * a.width * BYTE_LANES;
                const auto pixel = [&](int at) FORCED {
                    return at >= 0 && at < a.width ? from + at * BYTE_LANES : outside;
                };
                repeat<TW * Q>([&](auto t) FORCED {
                    constexpr int last = std::min(3, K - 1 - t % Q * 4);  // whose weight is not zero
                    const int at = (x + t / Q) * S - K / 2 + t % Q * 4;
                    // beyond it there may be any that is in memory
                    to[t] = at >= 0 && at + last < a.width && at + 3 <= a.width
                                ? quads(from + at * BYTE_LANES)
                                : quads(pixel(at), pixel(at + std::min(1, last)),
                                        pixel(at + std::min(2, last)), pixel(at + last));
                });
            }
    }

    // What filters make of the words of chunk h; `ends` says that it is the last one
    void add(int y, int x, int h, bool ends, int first, int last, Words* sums) const {
        constexpr int SETS = TH * TW >= 7 ? 1 : 8 / (TH * TW);
        const int32_t* start = a.op.byte_start + int64_t(h) * a.out_channels;
        for (int f = first; f < last; ++f, sums += TH * TW) {
            int k = start[f];
            const int end = start[f + 1];
            if (k == end && h && !ends) continue;
            Words acc[SETS][TH][TW] = {};
            if (h)
                repeat<TH * TW>([&](auto i) FORCED { acc[0][i / TW][i % TW] = sums[i]; });
            const auto one = [&](Words(&sum)[TH][TW], int k) FORCED {
                const Words* from = words + int64_t(a.op.byte_index[k]) * WORDS;
                const int32_t* w = (const int32_t*)a.op.byte_weight + int64_t(k) * K * Q;
                repeat<Q>([&](auto q) FORCED {
                    Words weights[K];
                    repeat<K>([&](auto ky) FORCED { weights[ky] = Words{} + w[ky * Q + q]; });
                    repeat<IH>([&](auto i) FORCED {
                        repeat<TW>([&](auto t) FORCED {
                            const Words codes = from[(i * TW + t) * Q + q];
                            repeat<K>([&](auto ky) FORCED {
                                constexpr int dy = i - ky;
                                if constexpr (dy >= 0 && dy % S == 0 && dy / S < TH)
                                    sum[dy / S][t] = add_dots(sum[dy / S][t], codes, weights[ky]);
                            });
                        });
                    });
                });
            };
            for (; k + SETS <= end; k += SETS)
                repeat<SETS>([&](auto s) FORCED { one(acc[s], k + s); });
            if constexpr (SETS > 1) {
                for (; k < end; ++k) one(acc[0], k);
                repeat<SETS - 1>([&](auto s) FORCED {
                    repeat<TH * TW>([&](auto i) FORCED {
                        acc[0][i / TW][i % TW] += acc[s + 1][i / TW][i % TW];
                    });
                });
            }
            if (!ends) {
                repeat<TH * TW>([&](auto i) FORCED { sums[i] = acc[0][i / TW][i % TW]; });
                continue;
            }
            end_sums(acc[0], f, y, x);
        }
    }

    // Sums of a filter to codes of its outputs
    FORCED void end_sums(const Words (&acc)[TH][TW], int f, int y, int x) const {
        using V = Types<float>::V;
        const Op& op = a.op;
        const float scale = op.byte_scale[f], bias = op.byte_bias[f];
        V made[TH][TW];
        const auto each = [&](auto change) FORCED {
            repeat<TH * TW>([&](auto i) FORCED {
                change(made[i / TW][i % TW], __builtin_convertvector(acc[i / TW][i % TW], V),
                       i / TW, i % TW);
            });
        };
        if (op.act > RELU) {
            each([&](V& value, V sum, int, int) FORCED { value = sum * scale + bias; });
            return finish<Byte, TH, TW>(a, f, y, x, made);
        }
        // in units of the outputs' codes, all of it
        const float unit = 1 / op.out_code.scale, least = op.act ? op.out_code.zero : 0;
        const float factor = scale * unit, beside = op.other_code.scale * unit;
        const float shift = bias * unit + op.out_code.zero;
        const int64_t first = (f * block_plane(a.out_height, a.out_width) +
                               int64_t(y) * a.out_width + x) * BYTE_LANES;
        const auto at = [&](int r, int t) FORCED {
            return first + (int64_t(r) * a.out_width + t) * BYTE_LANES;
        };
        if (a.other) {
            const float start = shift - beside * op.other_code.zero;
            each([&](V& value, V sum, int r, int t) FORCED {
                value = sum * factor + (load(a.other + at(r, t)) * beside + start);
            });
        } else {
            each([&](V& value, V sum, int, int) FORCED { value = sum * factor + shift; });
        }
        if (least > 0)
            each([&](V& value, V, int, int) FORCED { value = value < least ? V{} + least : value; });
        each([&](V& value, V, int r, int t) FORCED { store(a.out + at(r, t), value); });
    }

    void run(int y, int x) const {
        const int size = chunk(a.channels), chunks = (a.channels + size - 1) / size;
        Words* sums = words + WORDS_BYTES / VECTOR_BYTES;
        for (int first = a.first; first < a.last; first += chunks > 1 ? FILTERS : a.last) {
            const int last = chunks > 1 ? std::min(first + FILTERS, a.last) : a.last;
            for (int h = 0; h < chunks; ++h) {
                pack(y, x, h * size, std::min(size, a.channels - h * size));
                add(y, x, h, h + 1 == chunks, first, last, sums);
            }
        }
    }
};

// with(tile): the size of tile for outputs (height, width), as an empty ByteTile's type. Tiles that
// overlap are for planes of which a side is no multiple of 4
template <class With>
inline int with_byte_tile(int kernel, int stride, int height, int width, const With& with) {
    const auto sized = [&](auto th, auto tw) FORCED {
        const auto strided = [&](auto k) FORCED {
            if (stride == 1) return with((ByteTile<k, 1, th, tw>*)nullptr);
            return with((ByteTile<k, 2, th, tw>*)nullptr);
        };
        if (kernel == 1) return with((ByteTile<1, 1, th, tw>*)nullptr);
        if (kernel == 3) return strided(std::integral_constant<int, 3>{});
        if (kernel == 5) return strided(std::integral_constant<int, 5>{});
        return strided(std::integral_constant<int, 7>{});
    };
    const int side = std::min(height, width);
    if (side >= 7 && height % 8 == 0)
        return sized(std::integral_constant<int, 8>{}, std::integral_constant<int, WIDE>{});
    if (side >= 7 && height % 7 == 0)
        return sized(std::integral_constant<int, 7>{}, std::integral_constant<int, WIDE>{});
    if (side >= 4)
        return sized(std::integral_constant<int, 4>{}, std::integral_constant<int, 2 * WIDE>{});
    if (side >= 2)
        return sized(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
    return sized(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
}

inline int byte_chunk(int kernel, int stride, int height, int width, int channels) {
    return with_byte_tile(kernel, stride, height, width, [&](auto* tile) {
        return std::remove_pointer_t<decltype(tile)>::chunk(channels);
    });
}

// A conv with lists of bytes. Threads share the rows of tiles where there are many, else the filters
inline void byte_block(const Op& op, const Tensor& in, const Tensor& out, const Byte* x,
                       const Byte* other, Byte* y, Words* scratch, int part, int parts) {
    ConvBlock<Byte> a = {x, other, y, 0, out.channels, in.height, in.width, out.height, out.width,
                         op, nullptr, nullptr, nullptr};
    a.channels = in.channels, a.out_channels = out.channels;
    if (a.out_height < 8 * TILE_H * parts) {
        if (parts > 1) a.first = op.share[part], a.last = op.share[part + 1];
        part = 0, parts = 1;
    }
    with_byte_tile(op.rows.kernel, op.rows.stride, out.height, out.width, [&](auto* tile) {
        using Tile = std::remove_pointer_t<decltype(tile)>;
        const Tile made{a, scratch};
        tiles<Byte, Tile::HEIGHT, Tile::WIDTH>(a, part, parts,
                                               [&](int y, int x) { made.run(y, x); });
        return 0;
    });
}

}  // namespace
