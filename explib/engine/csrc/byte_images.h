// int8: square convolutions of single images, whose planes are flat: [C][rows without gaps].
//
// A vector holds the words (bytes.h) of outputs side by side: of one row, or where rows are short
// of the flat plane. What lies outside of the image is put in as the code of zero.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "bytes.h"

namespace {

// ---- Words of neighbouring pixels

#if defined(__AVX512VBMI__) || defined(__aarch64__)
// The bytes of the words: four from every S-th byte on
template <int S>
struct Order {
    alignas(64) uint8_t at[VECTOR_BYTES];
    constexpr Order() : at() {
        for (int i = 0; i < VECTOR_BYTES; ++i) at[i] = uint8_t(i / 4 * S + i % 4);
    }
};
#endif

// Four codes from every S-th on; S: 1 or 2
template <int S>
FORCED inline Words neighbours(const Byte* at) {
#if defined(__AVX512VBMI__)
    static constexpr Order<S> order;
    return (Words)_mm512_permutexvar_epi8(_mm512_load_si512(order.at), _mm512_loadu_si512(at));
#elif defined(__AVX2__)
    const __m128i bytes = S == 1 ? _mm_set_epi8(6, 5, 4, 3, 5, 4, 3, 2, 4, 3, 2, 1, 3, 2, 1, 0)
                                 : _mm_set_epi8(9, 8, 7, 6, 7, 6, 5, 4, 5, 4, 3, 2, 3, 2, 1, 0);
#if defined(__AVX512BW__)
    const __m512i words = S == 1
        ? _mm512_set_epi32(6, 5, 4, 3, 5, 4, 3, 2, 4, 3, 2, 1, 3, 2, 1, 0)
        : _mm512_set_epi32(9, 8, 7, 6, 7, 6, 5, 4, 5, 4, 3, 2, 3, 2, 1, 0);
    return (Words)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, _mm512_loadu_si512(at)),
                                      _mm512_broadcast_i32x4(bytes));
#else
    const __m128i low = _mm_loadu_si128((const __m128i*)at);
    const __m128i high = _mm_loadu_si128((const __m128i*)(at + 4 * S));
    return (Words)_mm256_shuffle_epi8(_mm256_set_m128i(high, low),
                                      _mm256_broadcastsi128_si256(bytes));
#endif
#elif defined(__aarch64__)
    static constexpr Order<S> order;
    return (Words)vqtbl1q_u8(vld1q_u8(&at->bits), vld1q_u8(order.at));
#else
    Words made = {};
    for (int lane = 0; lane < BYTE_LANES; ++lane) {
        int32_t word;
        std::memcpy(&word, at + lane * S, 4);
        made[lane] = word;
    }
    return made;
#endif
}

constexpr int NEAR = 64;  // bytes that it may read

// `codes` where the bits of `inside` say so, one for each byte, else those of `none`
FORCED inline Words chosen(Words codes, uint64_t inside, Words none) {
#if defined(__AVX512BW__)
    return (Words)_mm512_mask_mov_epi8((__m512i)none, inside, (__m512i)codes);
#else
    if (inside + 1 == (VECTOR_BYTES == 64 ? 0 : uint64_t(1) << VECTOR_BYTES % 64)) return codes;
#if defined(__AVX2__)
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(int(inside)),
        _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
    const __m256i bits = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i mask = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bits), bits);
    return (Words)_mm256_blendv_epi8((__m256i)none, (__m256i)codes, mask);
#elif defined(__aarch64__)
    const uint8x16_t bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const auto spread = vcombine_u8(vdup_n_u8(uint8_t(inside)), vdup_n_u8(uint8_t(inside >> 8)));
    return (Words)vbslq_u8(vtstq_u8(spread, bits), (uint8x16_t)codes, (uint8x16_t)none);
#else
    uint8_t made[VECTOR_BYTES], other[VECTOR_BYTES];
    std::memcpy(made, &codes, VECTOR_BYTES);
    std::memcpy(other, &none, VECTOR_BYTES);
    for (int i = 0; i < VECTOR_BYTES; ++i)
        if (!(inside >> i & 1)) made[i] = other[i];
    std::memcpy(&codes, made, VECTOR_BYTES);
    return codes;
#endif
#endif
}

// ---- How outputs lie in vectors

inline int vectors_of(int pixels) { return (pixels + BYTE_LANES - 1) / BYTE_LANES; }

// Whether vectors hold outputs of one row: where the last one of a row is not too empty
inline bool by_row(int kernel, int height, int width) {
    if (kernel == 1) return false;
    const float row = float(width) / (vectors_of(width) * BYTE_LANES);
    return row > 0.75f * height * width / (vectors_of(height * width) * BYTE_LANES);
}

// Which pixels the words of a conv's outputs hold: of each vector (of a row, or of the plane) where
// the first code of its first output is, and how far from there those of the others are
struct Windows {
    bool rows;
    int vectors;
    std::vector<int32_t> first;
    std::vector<int32_t> step;     // (vectors, lanes)
    std::vector<uint64_t> inside;  // (vectors, words of a kernel): a bit for each byte; of a row
                                   // only whether its columns are
    Windows(const Op& op, const Tensor& in, const Tensor& out) {
        const int K = op.rows.kernel, S = op.rows.stride, Q = (K + 3) / 4;
        rows = by_row(K, out.height, out.width);
        const int outputs = out.width * (rows ? 1 : out.height);
        vectors = vectors_of(outputs);
        inside.resize(vectors * K * Q);
        for (int v = 0; v < vectors; ++v)
            for (int lane = 0; lane < BYTE_LANES; ++lane) {
                const int at = std::min(v * BYTE_LANES + lane, outputs - 1);
                const int y = at / out.width * S - K / 2, x = at % out.width * S - K / 2;
                const int corner = y * in.width + x + (rows ? K / 2 * in.width : 0);
                if (!lane) first.push_back(corner);
                step.push_back(corner - first.back());
                if (v * BYTE_LANES + lane >= outputs) continue;
                for (int i = 0; i < K * Q * 4; ++i) {
                    const int row = y + i / (4 * Q), column = x + i % (4 * Q);
                    const bool unused = i % (4 * Q) >= K;  // weights are zero
                    const bool within = (rows || (row >= 0 && row < in.height)) && column >= 0 &&
                                        column < in.width;
                    inside[v * K * Q + i / 4] |= uint64_t(unused || within) << (4 * lane + i % 4);
                }
            }
    }
};

// Bytes before and behind planes that are read, but not used
inline int windows_reach(int width) { return round_up(3 * (width + 1) + 2 * NEAR, 64); }

// The first of a vector's codes, where a row ends within it
[[gnu::noinline]] inline void store_some(Byte* at, Types<float>::V codes, int count) {
    Byte made[BYTE_LANES];
    store(made, codes);
    std::memcpy(at, made, count);
}

// A conv of one image
struct ByteImage {
    const Op& op;
    const Tensor &in, &out;
    const Byte *from, *other;  // other: added to the outputs, or null
    Byte* to;
    int64_t in_plane, out_plane;  // bytes from a channel to the next
    const Windows& windows;
    ByteLists lists;
    int channels, filters, first, last;  // of the filters those to compute

    template <class Tile>
    void pack(Words* to, int y, int x, int first, int channels) const {
        constexpr int K = Tile::K, S = Tile::S, TH = Tile::TH, TW = Tile::TW, Q = Tile::Q;
        const Windows& w = windows;
        if constexpr (K == 1) {  // of pixels side by side, also where it has a stride
            const int32_t* channel = op.byte_channel + first;
            for (int c = 0; c < channels; c += POINT_CODES) {
                const Byte* codes[POINT_CODES];
                for (const Byte*& one : codes) one = from + *channel++ * in_plane;
                for (int i = 0; i < TH * TW; ++i)
                    *to++ = point_words(codes, int64_t(x + i) * BYTE_LANES);
            }
            return;
        }
        const Byte* codes = from + first * in_plane;
        const int wide = in.width;
        const Words none = Words{} + int32_t(uint32_t(op.in_code.zero) * 0x01010101u);
        for (int c = 0; c < channels; ++c, codes += in_plane) {
            if constexpr (S) {
                for (int i = 0; i < Tile::IH; ++i, to += TW * Q) {
                    const int row = y * S - K / 2 + i;
                    if (row < 0 || row >= in.height) {
                        repeat<TW * Q>([&](auto t) FORCED { to[t] = none; });
                        continue;
                    }
                    const Byte* from = codes + int64_t(row) * wide;
                    repeat<TW * Q>([&](auto t) FORCED {
                        const int v = x + t / Q;
                        const Words near = neighbours<S>(from + w.first[v] + t % Q * 4);
                        to[t] = chosen(near, w.inside[v * K * Q + t % Q], none);
                    });
                }
            } else {
                for (int i = 0; i < Tile::IH; ++i)
                    repeat<Q>([&](auto q) FORCED {
                        const int v = x + i % TH, ky = i / TH;
                        const Byte* at = codes + w.first[v] + ky * wide + q * 4;
                        const Words near = op.rows.stride == 1 ? neighbours<1>(at) : apart(at, v);
                        *to++ = chosen(near, w.inside[(v * K + ky) * Q + q], none);
                    });
            }
        }
    }

    // The four codes of each output of vector v, whose first output's are at `at`
    [[gnu::noinline]] Words apart(const Byte* at, int v) const {
        const int32_t* step = windows.step.data() + v * BYTE_LANES;
        int32_t made[BYTE_LANES];
        for (int lane = 0; lane < BYTE_LANES; ++lane) std::memcpy(made + lane, at + step[lane], 4);
        Words word;
        std::memcpy(&word, made, VECTOR_BYTES);
        return word;
    }

    template <class Tile>
    FORCED void end(const Words* sums, int f, int y, int x) const {
        constexpr int TW = Tile::TW;
        const int64_t plane = f * out_plane;
        const auto column = [&](int i) FORCED { return (x + i % TW) * BYTE_LANES; };
        const auto at = [&](int i) FORCED -> int64_t {
            if (!Tile::S) return plane + int64_t(x + i) * BYTE_LANES;
            return plane + int64_t(y + i / TW) * out.width + column(i);
        };
        const auto put = [&](int i, Types<float>::V codes) FORCED {
            const int live = Tile::S ? out.width - column(i) : BYTE_LANES;
            if (live >= BYTE_LANES) return store(to + at(i), codes);
            store_some(to + at(i), codes, live);
        };
        end_sums<Tile::TH * TW>(op, f, sums, other, at, put);
    }
};

// with(tile): a tile of a conv with outputs (height, width), as an empty ByteTile's type; by rows
// for `rows` of them and `vectors` of a row, else for `vectors` of the plane
template <class With>
inline int with_image_tile(int kernel, int stride, int height, int width, int together, int rows,
                           int vectors, const With& with) {
    const auto sized = [&](auto s, auto th, auto tw) FORCED {
        constexpr int few = th > 4 ? 8 : th > 2 ? 4 : 1;  // what is rare
        switch (kernel) {
            case 3: return with((ByteTile<ByteImage, 3, s, th, tw>*)nullptr);
            case 5: return with((ByteTile<ByteImage, 5, s, few, 1>*)nullptr);
            default: return with((ByteTile<ByteImage, 7, s, few, 1>*)nullptr);
        }
    };
    const auto of = [&](auto n) FORCED { return sized(Int<0>{}, n, Int<1>{}); };
    if (kernel == 1) return with_point_tile<ByteImage, 0>(together, vectors, with);
    if (!by_row(kernel, height, width)) {
        if (vectors >= 8) return of(Int<8>{});
        return vectors >= 4 ? of(Int<4>{}) : vectors >= 2 ? of(Int<2>{}) : of(Int<1>{});
    }
    const auto strided = [&](auto th, auto tw) FORCED {
        return stride == 1 ? sized(Int<1>{}, th, tw) : sized(Int<2>{}, th, tw);
    };
    const auto high = [&](auto th) FORCED {
        return vectors >= WIDE ? strided(th, Int<WIDE>{}) : strided(th, Int<1>{});
    };
    if (height % 7 == 0 && height % 8 && kernel == 3) {
        if (rows >= 7) return high(Int<7>{});
    } else if (rows >= 8) {
        return high(Int<8>{});
    }
    return rows >= 2 && kernel == 3 ? strided(Int<2>{}, Int<1>{}) : strided(Int<1>{}, Int<1>{});
}

inline int image_chunk(int kernel, int stride, int height, int width, int channels, int together) {
    const int vectors = vectors_of(by_row(kernel, height, width) ? width : height * width);
    if (kernel == 1) return byte_point_chunk<ByteImage>(together, vectors, channels);
    return with_image_tile(kernel, stride, height, width, together, height, vectors, [&](auto* tile) {
        return std::remove_pointer_t<decltype(tile)>::chunk(channels);
    });
}

// A conv with lists of bytes. Threads share what there is of rows or vectors, else the filters
inline void byte_image(ByteImage a, Words* scratch, int part, int parts) {
    const Op& op = a.op;
    const int K = op.rows.kernel, S = op.rows.stride, H = a.out.height, W = a.out.width;
    const int together = op.together, vectors = a.windows.vectors;
    const int size = image_chunk(K, S, H, W, a.channels, together);
    const int shared = a.windows.rows ? H : vectors;
    if (shared < 7 * parts) {
        if (parts > 1) a.first = op.share[part], a.last = op.share[part + 1];
        part = 0, parts = 1;
    }
    const int begin = (int)split(shared, part, parts), end = (int)split(shared, part + 1, parts);
    const auto run = [&](int y, int x, int rows, int vectors) {
        return with_image_tile(K, S, H, W, together, rows, vectors, [&](auto* tile) {
            using Tile = std::remove_pointer_t<decltype(tile)>;
            Tile{a, scratch}.run(y, x, size);
            return Tile::TH << 8 | Tile::TW;
        });
    };
    if (!a.windows.rows) {
        for (int v = begin; v < end;) v += run(0, v, 0, end - v) >> 8;
        return;
    }
    for (int y = begin, high; y < end; y += high)
        for (int x = 0; x < vectors;) {
            const int done = run(y, x, end - y, vectors - x);
            high = done >> 8, x += done & 255;
        }
}

}  // namespace
