// Blocks of images, [C][H][W][lanes]: a vector holds one pixel of as many images as it has lanes.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>

#include "byte_blocks.h"
#include "byte_depthwise.h"
#include "general.h"
#include "ops.h"
#include "plan.h"
#include "pointwise.h"
#include "pools.h"
#include "threads.h"
#include "vectors.h"
#include "winograd_blocks.h"
#include "winograd_columns.h"

namespace {

// One tile of every filter; K is 3 and the padding K / 2. The input pixels of a tile are
// loaded once per kernel and go to all outputs they belong to; those outside the image are left
// out.
template <class T, int K, int S, int TH, int TW>
void conv_tile(const ConvBlock<T> a, int y, int x) {
    USE_TYPES;
    constexpr int P = K / 2, IH = (TH - 1) * S + K, IW = (TW - 1) * S + K;
    constexpr int SETS = TH * TW >= 8 ? 1 : 8 / (TH * TW);  // enough sums to hide their latency
    const int top = y * S - P, left = x * S - P;
    const bool first_row = top >= 0, last_row = top + IH <= a.height;
    const bool first_col = left >= 0, last_col = left + IW <= a.width;
    const int64_t plane = block_plane(a.height, a.width);
    const int64_t origin = int64_t(top) * a.width + left;
    const int32_t* index = (const int32_t*)a.index;
    for (int i = a.first; i < a.last; ++i) {
        const int f = a.order ? a.order[i] : i;
        V acc[SETS][TH][TW] = {};
        start_from(splat(typename Types<T>::Scalar(a.op.bias[f])), acc[0]);
        prefetch_other<TH, TW>(a, f, y, x);
        const auto add = [&](V(&sum)[TH][TW], int k) FORCED {
            const int32_t* w = a.weight + int64_t(k) * K * K;
            const Source<T> source(a.in, index + k * Source<T>::channels, plane * LANES);
            repeat<IH>([&](auto i) FORCED {
                if ((i < P && !first_row) || (i >= IH - P && !last_row)) return;
                const auto row = source.from((origin + int64_t(i) * a.width) * LANES);
                repeat<IW>([&](auto j) FORCED {
                    if ((j < P && !first_col) || (j >= IW - P && !last_col)) return;
                    auto pixel = row[j * LANES];
                    if constexpr (BESIDE == 1 && std::is_same_v<decltype(pixel), V>) keep(pixel);
                    repeat<K>([&](auto ky) FORCED {
                        constexpr int dy = i - ky;
                        if constexpr (dy >= 0 && dy % S == 0 && dy / S < TH)
                            repeat<K>([&](auto kx) FORCED {
                                constexpr int dx = j - kx;
                                if constexpr (dx >= 0 && dx % S == 0 && dx / S < TW)
                                    sum[dy / S][dx / S] = add_product<T>(sum[dy / S][dx / S],
                                                                         pixel, w + ky * K + kx);
                            });
                    });
                });
            });
        };
        int k = a.start[i];
        const int end = a.start[i + 1];
        if constexpr (SETS > 1)
            for (; k + SETS <= end; k += SETS)
                repeat<SETS>([&](auto s) FORCED { add(acc[s], k + s); });
        for (; k < end; ++k) add(acc[0], k);
        repeat<SETS - 1>([&](auto s) FORCED {
            repeat<TH>([&](auto r) FORCED {
                repeat<TW>([&](auto c) FORCED { acc[0][r][c] += acc[s + 1][r][c]; });
            });
        });
        finish<T, TH, TW>(a, f, y, x, acc[0]);
    }
}

template <class T, int TH, int TW>
void conv_sized(const ConvBlock<T>& a, int part, int parts) {
    tiles<TH, TW>(a.out_height, a.out_width, part, parts, [&](int y, int x) {
        if (a.op.rows.kernel == 1)
            conv_tile<T, 1, 1, TH, TW>(a, y, x);
        else if (a.op.rows.stride == 1)
            conv_tile<T, 3, 1, TH, TW>(a, y, x);
        else
            conv_tile<T, 3, 2, TH, TW>(a, y, x);
    });
}

// A conv with lists of kernels by filter. Threads share the rows of tiles where there are many, else
// the filters
template <class T>
void conv_block(const Op& op, const Tensor& in, const Tensor& out, const T* x, const T* other, T* y,
                int part, int parts) {
    const int kernel = op.rows.kernel, stride = op.rows.stride;
    if (!is_plain(op, in, out) || stride > (kernel == 3 ? 2 : 1))
        return general_block<T>({op, in, out, x, other, y, block_plane(in.height, in.width) *
                                 Types<T>::lanes, block_plane(out.height, out.width) *
                                 Types<T>::lanes}, part, parts);
    constexpr bool PAIRS = Source<T>::channels == 2;
    ConvBlock<T> a = {x, other, y, 0, out.channels, in.height, in.width, out.height, out.width, op,
                      (const int32_t*)(PAIRS ? op.pair_weight : op.weight),
                      PAIRS ? op.pair_start : op.start, PAIRS ? nullptr : op.order,
                      PAIRS ? op.pair_index : op.index};
    if (a.out_height < 4 * TILE_H * parts) {
        if (parts > 1) a.first = op.share[part], a.last = op.share[part + 1];
        part = 0, parts = 1;
    }
    const int side = std::min(a.out_height, a.out_width);
    if (side >= 4) return conv_sized<T, TILE_H, TILE_W>(a, part, parts);
    if (side >= 2) return conv_sized<T, 2, 2>(a, part, parts);
    conv_sized<T, 1, 1>(a, part, parts);
}

// scores: where the result goes, unrounded, if the network ends here; (live images, features)
template <class T>
void linear_block(const T* in, T* out, const Op& op, int channels, int features, float* scores,
                  int live, int part, int parts) {
    USE_TYPES;
    constexpr int GROUP = 8;
    using Scalar = typename Types<T>::Scalar;
    const Scalar* weight = (const Scalar*)op.weight;
    const int groups = (features + GROUP - 1) / GROUP;
    const int last = (int)split(groups, part + 1, parts) * GROUP;
    for (int f = (int)split(groups, part, parts) * GROUP; f < last; f += GROUP) {
        V acc[GROUP];
        const Scalar* rows[GROUP];
        for (int g = 0; g < GROUP; ++g) {
            const int feature = std::min(f + g, features - 1);
            acc[g] = splat(Scalar(op.bias[feature]));
            rows[g] = weight + int64_t(feature) * channels;
        }
        for (int c = 0; c < channels; ++c) {
            const V x = decoded<T>(load(in + int64_t(c) * LANES), op.in_code);
            repeat<GROUP>([&](auto g) FORCED { acc[g] += x * rows[g][c]; });
        }
        for (int g = 0; g < GROUP && f + g < features; ++g) {
            V value = acc[g];
            activate<1>(op, f + g, &value);
            if (!scores) store(out + int64_t(f + g) * LANES, coded<T>(value, op.out_code));
            for (int lane = 0; scores && lane < live; ++lane)
                scores[int64_t(lane) * features + f + g] = float(value[lane]);
        }
    }
}

// A 1x1 conv with lists by chunk. Threads share the pixels where there are many, else the filters
template <class T>
void point_block(const Op& op, const Tensor& in, const Tensor& out, const T* x, const T* other,
                 T* y, const PointScratch& scratch, int part, int parts) {
    USE_TYPES;
    constexpr bool PAIRS = Source<T>::channels == 2;
    const int64_t plane = block_plane(in.height, in.width) * LANES;
    Points<T> points_of = {.in = x, .other = other, .out = y,
                           .out_plane = block_plane(out.height, out.width) * LANES,
                           .channels = in.channels, .filters = out.channels, .first = 0,
                           .last = out.channels, .op = &op,
                           .weight = (const int32_t*)(PAIRS ? op.pair_weight : op.weight),
                           .start = PAIRS ? op.pair_start : op.start,
                           .order = PAIRS ? nullptr : op.order,
                           .index = (const uint8_t*)(PAIRS ? op.pair_index : op.index)};
    points_of.use(scratch);
    const int pixels = out.height * out.width;
    if (parts > 1 && pixels < 8 * tile_vectors<T>(op, in.channels) * parts) {
        points_of.first = op.share[part], points_of.last = op.share[part + 1];
        part = 0, parts = 1;
    }
    points(points_of, (int)split(pixels, part, parts), (int)split(pixels, part + 1, parts),
           [&](int first, int count) {
               return [=, &op, &in, &out](int channel, int n, T* tile) {
                   const T* from = x + channel * plane;
                   for (int c = 0; c < n; ++c, from += plane, tile += count * LANES) {
                       if (op.rows.stride == 1) {
                           std::memcpy(tile, from + int64_t(first) * LANES,
                                       count * LANES * sizeof(T));
                           continue;
                       }
                       int y = first / out.width, x = first % out.width;
                       for (int i = 0; i < count; ++i) {
                           const int64_t at = (int64_t(y) * in.width + x) * op.rows.stride;
                           std::memcpy(tile + i * LANES, from + at * LANES, LANES * sizeof(T));
                           if (++x == out.width) x = 0, ++y;
                       }
                   }
               };
           });
}

// The whole network on one block at a time; each worker has memory of its own, on which one thread
// or, where there are fewer blocks than threads, all of them work
template <class T>
class Blocks {
    using V = typename Types<T>::V;
    using Words = typename Types<T>::Words;
    static constexpr int LANES = Types<T>::lanes;
    const Plan& plan;
    std::vector<int64_t> starts;  // of the slots, in scalars
    int64_t size = 0;
    std::vector<std::unique_ptr<Memory>> memories;
    std::vector<std::unique_ptr<PointScratch>> scratch;
    std::vector<std::unique_ptr<Memory>> byte_scratch;  // of int8's convs
    std::vector<std::unique_ptr<Memory>> winograd_scratch;
    int64_t winograd_size = 0;  // in bytes

    T* data(T* memory, int t) const {
        const Tensor& a = plan.tensors[t];
        return memory + starts[a.slot] + a.first * block_plane(a.height, a.width) * LANES;
    }

  public:
    explicit Blocks(const Plan& plan)
        : plan(plan), memories(plan.threads), scratch(plan.threads), byte_scratch(plan.threads),
          winograd_scratch(plan.threads) {
        for (const Slot& s : plan.slots) {
            starts.push_back(size);
            size += s.channels * block_plane(s.height, s.width) * LANES;
        }
        for (const Op& op : plan.ops)
            if (op.kind == CONV && (op.winograd || op.winograd_columns)) {
                const int in = plan.tensors[op.in].channels, out = plan.tensors[op.out].channels;
                winograd_size = std::max(winograd_size, winograd_vectors(in, out) * VECTOR_BYTES);
            }
    }

    // Bytes of the largest value
    int64_t largest() const {
        int64_t most = 0;
        for (const Slot& s : plan.slots)
            most = std::max(most, int64_t(s.channels) * s.height * s.width);
        return most * LANES * int64_t(sizeof(T));
    }

    void prepare() {
        for (auto& memory : memories)
            if (!memory) memory = std::make_unique<Memory>(size * sizeof(T));
        PointScratch::prepare(scratch);
        for (auto& one : winograd_scratch)
            if (!one && winograd_size) one = std::make_unique<Memory>(winograd_size);
        if (std::is_same_v<T, Byte>)
            for (auto& one : byte_scratch)
                if (!one) one = std::make_unique<Memory>(WORDS_BYTES + BYTE_SUMS_BYTES);
    }

    void run(const float* const* in, float* const* out, int64_t images, int64_t block,
             const Part& by) {
        T* memory = (T*)memories[by.worker]->data;
        const int64_t first = block * LANES;
        const int live = (int)std::min<int64_t>(LANES, images - first);
        for (const Op& op : plan.ops) {
            run_op(op, by.worker, memory, in, out, first, live, by.part, by.parts);
            by.barrier.wait(by.parts);
        }
    }

  private:
    void run_op(const Op& op, int worker, T* memory, const float* const* ins, float* const* outs,
                int64_t first, int live, int part, int parts) {
        const Tensor& a = plan.tensors[op.in >= 0 ? op.in : op.out];
        const Tensor& o = plan.tensors[op.out >= 0 ? op.out : op.in];
        const T* in = op.in >= 0 ? data(memory, op.in) : nullptr;
        T* out = op.out >= 0 ? data(memory, op.out) : nullptr;
        const int64_t from = block_plane(a.height, a.width), to = block_plane(o.height, o.width);
        if (op.kind == CONV) {
            const T* other = op.other >= 0 ? data(memory, op.other) : nullptr;
            const int own = parts == 1 ? worker : part;
            if constexpr (std::is_same_v<T, Byte>) {
                if (op.byte_weight && is_depthwise(op, a))
                    return byte_depthwise({in, other, out, 0, o.channels, a.height, a.width,
                                           o.height, o.width, op, (const int32_t*)op.byte_weight,
                                           op.byte_start, nullptr, nullptr},
                                          a.channels, o.channels, part, parts);
                if (op.byte_weight)
                    return byte_block(op, a, o, in, other, out, (Words*)byte_scratch[own]->data,
                                      part, parts);
                return general_block<T>({op, a, o, in, other, out, from * LANES, to * LANES}, part,
                                        parts);
            } else {
                if (is_plain(op, a, o) && op.rows.kernel == 1)
                    return point_block<T>(op, a, o, in, other, out, *scratch[own], part, parts);
                if constexpr (std::is_same_v<T, float>) {
                    const ConvBlock<T> conv = {in, other, out, 0, o.channels, a.height, a.width,
                                               o.height, o.width, op, nullptr, op.start, op.order,
                                               op.index};
                    V* points = winograd_size ? (V*)winograd_scratch[own]->data : nullptr;
                    if (BY_COLUMNS && op.winograd_columns)
                        return winograd_columns<T>(conv, a.channels, points, part, parts);
                    if (op.winograd)
                        return winograd_block<T>(conv, a.channels, o.channels, points, part, parts);
                }
                return conv_block<T>(op, a, o, in, other, out, part, parts);
            }
        }
        if (op.kind == LINEAR) {
            float* scores = op.other >= 0 ? outs[op.other] + first * o.channels : nullptr;
            return linear_block<T>(in, out, op, a.channels, o.channels, scores, live, part, parts);
        }
        const int pixels = a.height * a.width;
        if (op.kind == LAYERNORM)
            return layernorm<T>(op, in, out, from * LANES, a.channels, nullptr,
                                split(pixels, part, parts), split(pixels, part + 1, parts));
        const BlockPixels<T> layout{a.width, o.width};
        if (op.kind == GROUPNORM)
            return groupnorm(op, layout, a, in, out, from * LANES, to * LANES, part, parts);
        const int channels = op.kind == FLATTEN ? a.channels : o.channels;
        const int last = (int)split(channels, part + 1, parts);
        for (int c = (int)split(channels, part, parts); c < last; ++c) {
            const T* x = in + c * from * LANES;
            T* y = out + c * to * LANES;
            switch (op.kind) {
                case LOAD:
                    for (int start = 0; start < pixels; start += 64)
                        for (int lane = 0; lane < LANES; ++lane) {
                            const float* image =
                                ins[op.other] + ((first + lane) * channels + c) * pixels;
                            for (int i = start; i < std::min(pixels, start + 64); ++i) {
                                const float value = lane < live ? image[i] : 0.f;
                                y[int64_t(i) * LANES + lane] = T(coded<T>(value, op.out_code));
                            }
                        }
                    break;
                case STORE:
                    for (int lane = 0; lane < live; ++lane) {
                        float* image = outs[op.other] + ((first + lane) * channels + c) * pixels;
                        for (int i = 0; i < pixels; ++i)
                            image[i] = decoded<T>(float(x[int64_t(i) * LANES + lane]), op.in_code);
                    }
                    break;
                case MAXPOOL:
                case AVGPOOL:
                    pool_block(op, a, o, x, y);
                    break;
                case SELECT: {
                    const int source = op.index[c];
                    select_plane(op, layout, o, source < 0 ? nullptr : in + source * from * LANES,
                                 y);
                    break;
                }
                case BILINEAR:
                    bilinear_plane(op, layout, a, o, x, y);
                    break;
                default: {
                    const T* z = nullptr;
                    V point = {};
                    if (op.other >= 0) {
                        const Tensor& b = plan.tensors[op.other];
                        z = data(memory, op.other) +
                            (b.channels == 1 ? 0 : c) * block_plane(b.height, b.width) * LANES;
                        if (b.height * b.width < pixels)
                            point = decoded<T>(load(z), op.other_code), z = nullptr;
                    }
                    elementwise(op, c, x, z, point, y, (const V*)nullptr, pixels);
                    break;
                }
                case FLATTEN:
                    std::memcpy(out + int64_t(c) * pixels * LANES, x, pixels * LANES * sizeof(T));
                    break;
            }
        }
    }
};

}  // namespace
