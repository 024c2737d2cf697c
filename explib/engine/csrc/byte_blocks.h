// int8: square convolutions of blocks of images, [C][H][W][lanes].
#pragma once
#include <algorithm>
#include <cstring>

#include "bytes.h"
#include "tiles.h"

namespace {

// A conv of a block of images
struct ByteBlock {
    const Op& op;
    const Tensor &in, &out;
    const Byte *from, *other;  // other: added to the outputs, or null
    Byte* to;
    ByteLists lists;
    int channels, filters, first, last;  // of the filters those to compute

    template <class Tile>
    void pack(Words* to, int y, int x, int first, int channels) const {
        constexpr int K = Tile::K, S = Tile::S ? Tile::S : 1, Q = Tile::Q;
        constexpr int TH = Tile::TH, TW = Tile::TW;
        const int64_t plane = block_plane(in.height, in.width) * BYTE_LANES;
        if constexpr (K == 1) {
            const int32_t* channel = op.byte_channel + first;
            int64_t at[TH];
            for (int i = 0; i < TH; ++i) {
                const int row = (x + i) / out.width, column = (x + i) % out.width;
                at[i] = (int64_t(row) * in.width + column) * op.rows.stride * BYTE_LANES;
            }
            for (int c = 0; c < channels; c += POINT_CODES) {
                const Byte* codes[POINT_CODES];
                for (const Byte*& one : codes) one = from + *channel++ * plane;
                for (const int64_t pixel : at) *to++ = point_words(codes, pixel);
            }
            return;
        }
        const Byte* codes = from + first * plane;
        Byte outside[BYTE_LANES];
        std::memset(outside, int(op.in_code.zero), BYTE_LANES);
        const Words none = quads(outside, outside, outside, outside);
        for (int c = 0; c < channels; ++c, codes += plane)
            for (int i = 0; i < Tile::IH; ++i, to += TW * Q) {
                const int row = y * S - K / 2 + i;
                if (row < 0 || row >= in.height) {
                    repeat<TW * Q>([&](auto t) FORCED { to[t] = none; });
                    continue;
                }
                const Byte* from = codes + int64_t(row) * in.width * BYTE_LANES;
                repeat<TW * Q>([&](auto t) FORCED {
                    constexpr int last = std::min(3, K - 1 - t % Q * 4);
                    const int at = (x + t / Q) * S - K / 2 + t % Q * 4;
                    to[t] = quads_of_row(from, in.width, at, last, outside);
                });
            }
    }

    template <class Tile>
    FORCED void end(const Words* sums, int f, int y, int x) const {
        const int64_t pixel = f * block_plane(out.height, out.width) + int64_t(y) * out.width + x;
        const int64_t first = pixel * BYTE_LANES;
        const auto at = [&](int i) FORCED {
            const int64_t row = Tile::S ? int64_t(i / Tile::TW) * out.width : i;
            return first + (row + i % Tile::TW) * BYTE_LANES;
        };
        end_sums<Tile::TH * Tile::TW>(
            op, f, sums, other, at,
            [&](int i, Types<float>::V codes) FORCED { store(to + at(i), codes); });
    }
};

// with(tile): the size of tile for outputs (height, width), as an empty ByteTile's type. Tiles that
// overlap are for planes of which a side is no multiple of 4
template <class With>
inline int with_byte_tile(int kernel, int stride, int height, int width, const With& with) {
    const auto sized = [&](auto th, auto tw) FORCED {
        const auto strided = [&](auto k) FORCED {
            if (stride == 1) return with((ByteTile<ByteBlock, k, 1, th, tw>*)nullptr);
            return with((ByteTile<ByteBlock, k, 2, th, tw>*)nullptr);
        };
        if (kernel == 3) return strided(Int<3>{});
        return kernel == 5 ? strided(Int<5>{}) : strided(Int<7>{});
    };
    const int side = std::min(height, width);
    if (side >= 7 && height % 8 == 0) return sized(Int<8>{}, Int<WIDE>{});
    if (side >= 7 && height % 7 == 0) return sized(Int<7>{}, Int<WIDE>{});
    if (side >= 4) return sized(Int<4>{}, Int<2 * WIDE>{});
    if (side >= 2) return sized(Int<2>{}, Int<2>{});
    return sized(Int<1>{}, Int<1>{});
}

// Channels of a chunk; together: filters at once of a 1x1 conv
inline int byte_chunk(int kernel, int stride, int height, int width, int channels, int together) {
    if (kernel == 1) return byte_point_chunk<ByteBlock>(together, height * width, channels);
    return with_byte_tile(kernel, stride, height, width, [&](auto* tile) {
        return std::remove_pointer_t<decltype(tile)>::chunk(channels);
    });
}

// A conv with lists of bytes. Threads share the rows of tiles where there are many, else the filters
inline void byte_block(const Op& op, const Tensor& in, const Tensor& out, const Byte* x,
                       const Byte* other, Byte* y, Words* scratch, int part, int parts) {
    const int K = op.rows.kernel, S = op.rows.stride, pixels = out.height * out.width;
    const ByteLists lists{(const int32_t*)op.byte_weight, op.byte_start, op.byte_index};
    ByteBlock a{op, in, out, x, other, y, lists, in.channels, out.channels, 0, out.channels};
    const int size = byte_chunk(K, S, out.height, out.width, in.channels, op.together);
    if (K == 1 ? pixels < 8 * POINT_TILE * parts : out.height < 8 * TILE_H * parts) {
        if (parts > 1) a.first = op.share[part], a.last = op.share[part + 1];
        part = 0, parts = 1;
    }
    if (K == 1) {
        const int end = (int)split(pixels, part + 1, parts);
        for (int p = (int)split(pixels, part, parts); p < end;)
            p += with_point_tile<ByteBlock, 0>(op.together, end - p, [&](auto* tile) {
                using Tile = std::remove_pointer_t<decltype(tile)>;
                Tile{a, scratch}.run(0, p, size);
                return Tile::TH;
            });
        return;
    }
    with_byte_tile(K, S, out.height, out.width, [&](auto* tile) {
        using Tile = std::remove_pointer_t<decltype(tile)>;
        const Tile made{a, scratch};
        tiles<Tile::TH, Tile::TW>(out.height, out.width, part, parts,
                                  [&](int y, int x) { made.run(y, x, size); });
        return 0;
    });
}

}  // namespace
