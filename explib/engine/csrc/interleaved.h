// Blocks of images, [C][H][W][lanes]: a vector holds one pixel of as many images as it has lanes.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>

#include "plan.h"
#include "pointwise.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int CACHE_SKEW = 6;  // lines

// Planes of a multiple of 4 KiB would all fall on the same few lines of the first cache
inline int64_t block_plane(int height, int width) {
    const int64_t pixels = int64_t(height) * width;
    return pixels % 64 ? pixels : pixels + CACHE_SKEW;
}
template <class T>
struct ConvBlock {
    const T* in;
    const T* other;  // added to the outputs, or null
    T* out;
    int first, last;  // the filters to compute
    int height, width, out_height, out_width, kernel, stride, pad, relu;
    const int32_t* weight;
    const float* bias;
    const int32_t* start;
    const void* index;  // int32_t, of a 1x1 conv uint8_t
};

template <class V, int TH, int TW>
FORCED inline void start_from(V bias, V (&acc)[TH][TW]) {
    repeat<TH>([&](auto r) FORCED { repeat<TW>([&](auto c) FORCED { acc[r][c] = bias; }); });
}

template <class T, int TH, int TW>
FORCED inline void finish(const ConvBlock<T>& a, int f, int y, int x,
                          typename Types<T>::V (&acc)[TH][TW]) {
    USE_TYPES;
    const int64_t first =
        (f * block_plane(a.out_height, a.out_width) + int64_t(y) * a.out_width + x) * LANES;
    const auto each = [&](auto change) FORCED {
        repeat<TH>([&](auto r) FORCED {
            const int64_t row = first + int64_t(r) * a.out_width * LANES;
            repeat<TW>([&](auto c) FORCED { change(acc[r][c], row, c * LANES); });
        });
    };
    if (a.other)
        each([&](V& sum, int64_t row, int at) FORCED { sum += load(a.other + row + at); });
    if (a.relu)
        each([&](V& sum, int64_t row, int at)
                 FORCED { store(a.out + row + at, rectified(sum)); });
    else
        each([&](V& sum, int64_t row, int at) FORCED { store(a.out + row + at, sum); });
}

// One tile of every filter; K is 1 or 3 and the padding K / 2. The input pixels of a tile are
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
    for (int f = a.first; f < a.last; ++f) {
        V acc[SETS][TH][TW] = {};
        start_from(splat(typename Types<T>::Scalar(a.bias[f])), acc[0]);
        const auto add = [&](V(&sum)[TH][TW], int k) FORCED {
            const int32_t* w = a.weight + int64_t(k) * K * K;
            const Source<T> source(a.in, index + k * Source<T>::channels, plane * LANES);
            repeat<IH>([&](auto i) FORCED {
                if ((i < P && !first_row) || (i >= IH - P && !last_row)) return;
                const auto row = source.from((origin + int64_t(i) * a.width) * LANES);
                repeat<IW>([&](auto j) FORCED {
                    if ((j < P && !first_col) || (j >= IW - P && !last_col)) return;
                    const auto pixel = row[j * LANES];
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
        int k = a.start[f];
        const int end = a.start[f + 1];
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

// Any kernel, stride and padding: the same tile with its borders tested pixel by pixel
template <class T, int TH, int TW>
void conv_tile_any(const ConvBlock<T> a, int y, int x) {
    USE_TYPES;
    const int K = a.kernel;
    for (int f = a.first; f < a.last; ++f) {
        V acc[TH][TW];
        start_from(splat(typename Types<T>::Scalar(a.bias[f])), acc);
        for (int k = a.start[f]; k < a.start[f + 1]; ++k) {
            const Source<T> source(a.in, (const int32_t*)a.index + k * Source<T>::channels,
                                   block_plane(a.height, a.width) * LANES);
            for (int tap = 0; tap < K * K; ++tap) {
                const int32_t* w = a.weight + int64_t(k) * K * K + tap;
                const int top = y * a.stride - a.pad + tap / K,
                          left = x * a.stride - a.pad + tap % K;
                repeat<TH>([&](auto r) FORCED {
                    const int row = top + r * a.stride;
                    if (row < 0 || row >= a.height) return;
                    repeat<TW>([&](auto c) FORCED {
                        const int col = left + c * a.stride;
                        if (col >= 0 && col < a.width)
                            acc[r][c] = add_product<T>(
                                acc[r][c], source[(int64_t(row) * a.width + col) * LANES], w);
                    });
                });
            }
        }
        finish<T, TH, TW>(a, f, y, x, acc);
    }
}

// The tiles of one of `parts` threads. The last one of a row or column ends with it and may overlap
// the one before, of the same thread: where the outputs are also the residual it must not
template <class T, int TH, int TW, void (*TILE)(const ConvBlock<T>, int, int)>
void tiles(const ConvBlock<T>& a, int part, int parts) {
    const int rows = (a.out_height + TH - 1) / TH;
    for (int r = (int)split(rows, part, parts); r < (int)split(rows, part + 1, parts); ++r)
        for (int x = 0; x < a.out_width; x += TW)
            TILE(a, std::min(r * TH, a.out_height - TH), std::min(x, a.out_width - TW));
}

template <class T, int TH, int TW>
void conv_sized(const ConvBlock<T>& a, int part, int parts) {
    const bool same = a.pad == a.kernel / 2;
    if (same && a.kernel == 3 && a.stride == 1)
        return tiles<T, TH, TW, conv_tile<T, 3, 1, TH, TW>>(a, part, parts);
    if (same && a.kernel == 3 && a.stride == 2)
        return tiles<T, TH, TW, conv_tile<T, 3, 2, TH, TW>>(a, part, parts);
    tiles<T, TH, TW, conv_tile_any<T, TH, TW>>(a, part, parts);
}

// Threads share the rows of tiles where there are many, else the filters
template <class T>
void conv_block(ConvBlock<T> a, const int32_t* share, int part, int parts) {
    if (a.out_height < 4 * TILE_H * parts) {
        if (parts > 1) a.first = share[part], a.last = share[part + 1];
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
            const V x = load(in + int64_t(c) * LANES);
            repeat<GROUP>([&](auto g) FORCED { acc[g] += x * rows[g][c]; });
        }
        for (int g = 0; g < GROUP && f + g < features; ++g) {
            const V value = op.relu ? rectified(acc[g]) : acc[g];
            if (!scores) store(out + int64_t(f + g) * LANES, value);
            for (int lane = 0; scores && lane < live; ++lane)
                scores[int64_t(lane) * features + f + g] = float(value[lane]);
        }
    }
}

// A 1x1 conv. Threads share the pixels where there are many, else the filters
template <class T>
void point_block(const ConvBlock<T>& a, int channels, const int32_t* share,
                 const PointScratch& scratch, int part, int parts) {
    USE_TYPES;
    const int64_t plane = block_plane(a.height, a.width) * LANES;
    Points<T> points_of = {.in = a.in, .other = a.other, .out = a.out,
                           .out_plane = block_plane(a.out_height, a.out_width) * LANES,
                           .channels = channels, .filters = a.last, .first = a.first,
                           .last = a.last, .relu = bool(a.relu), .weight = a.weight,
                           .bias = a.bias, .start = a.start,
                           .index = (const uint8_t*)a.index};
    points_of.use(scratch);
    const int pixels = a.out_height * a.out_width;
    if (parts > 1 && pixels < 8 * POINTS * parts) {
        points_of.first = share[part], points_of.last = share[part + 1];
        part = 0, parts = 1;
    }
    points(points_of, (int)split(pixels, part, parts), (int)split(pixels, part + 1, parts),
           [&](int first, int count) {
               return [=, &a](int channel, int n, T* tile) {
                   const T* from = a.in + channel * plane;
                   for (int c = 0; c < n; ++c, from += plane, tile += count * LANES) {
                       if (a.stride == 1) {
                           std::memcpy(tile, from + int64_t(first) * LANES,
                                       count * LANES * sizeof(T));
                           continue;
                       }
                       int y = first / a.out_width, x = first % a.out_width;
                       for (int i = 0; i < count; ++i) {
                           const int64_t at = (int64_t(y) * a.width + x) * a.stride;
                           std::memcpy(tile + i * LANES, from + at * LANES, LANES * sizeof(T));
                           if (++x == a.out_width) x = 0, ++y;
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
    using Scalar = typename Types<T>::Scalar;
    static constexpr int LANES = Types<T>::lanes;
    const Plan& plan;
    std::vector<int64_t> starts;  // of the slots, in scalars
    int64_t size = 0;
    std::vector<std::unique_ptr<Memory>> memories;
    std::vector<std::unique_ptr<PointScratch>> scratch;

    T* data(T* memory, int t) const {
        const Tensor& a = plan.tensors[t];
        return memory + starts[a.slot] + a.first * block_plane(a.height, a.width) * LANES;
    }

  public:
    explicit Blocks(const Plan& plan)
        : plan(plan), memories(plan.threads), scratch(plan.threads) {
        for (const Slot& s : plan.slots) {
            starts.push_back(size);
            size += s.channels * block_plane(s.height, s.width) * LANES;
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
    }

    // One of `parts` threads that run this at once on the same worker's memory
    void run(int worker, const float* const* in, float* const* out, int64_t images, int64_t block,
             int part, int parts, Barrier& barrier) {
        T* memory = (T*)memories[worker]->data;
        const int64_t first = block * LANES;
        const int live = (int)std::min<int64_t>(LANES, images - first);
        for (const Op& op : plan.ops) {
            run_op(op, worker, memory, in, out, first, live, part, parts);
            barrier.wait(parts);
        }
    }

  private:
    void run_op(const Op& op, int worker, T* memory, const float* const* ins, float* const* outs,
                int64_t first, int live, int part, int parts) {
        const Tensor& a = plan.tensors[op.in >= 0 ? op.in : op.out];
        const Tensor& o = plan.tensors[op.out >= 0 ? op.out : op.in];
        const T* in = op.in >= 0 ? data(memory, op.in) : nullptr;
        T* out = op.out >= 0 ? data(memory, op.out) : nullptr;
        if (op.kind == CONV) {
            constexpr bool pairs = Source<T>::channels == 2;
            const ConvBlock<T> conv = {in, op.other >= 0 ? data(memory, op.other) : nullptr, out, 0,
                                       o.channels, a.height, a.width, o.height, o.width, op.kernel,
                                       op.stride, op.pad, op.relu,
                                       (const int32_t*)(pairs ? op.pair_weight : op.weight),
                                       op.bias, pairs ? op.pair_start : op.start,
                                       pairs ? op.pair_index : op.index};
            if (op.kernel == 1)
                return point_block<T>(conv, a.channels, op.share,
                                      *scratch[parts == 1 ? worker : part], part, parts);
            return conv_block<T>(conv, op.share, part, parts);
        }
        if (op.kind == LINEAR) {
            float* scores = op.other >= 0 ? outs[op.other] + first * o.channels : nullptr;
            return linear_block<T>(in, out, op, a.channels, o.channels, scores, live, part, parts);
        }
        const int64_t from = block_plane(a.height, a.width), to = block_plane(o.height, o.width);
        const int pixels = a.height * a.width;
        const int channels = op.kind == SUBSAMPLE ? o.channels : a.channels;
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
                            for (int i = start; i < std::min(pixels, start + 64); ++i)
                                y[int64_t(i) * LANES + lane] = T(lane < live ? image[i] : 0.f);
                        }
                    break;
                case STORE:
                    for (int lane = 0; lane < live; ++lane) {
                        float* image = outs[op.other] + ((first + lane) * channels + c) * pixels;
                        for (int i = 0; i < pixels; ++i)
                            image[i] = float(x[int64_t(i) * LANES + lane]);
                    }
                    break;
                case MAXPOOL:
                case AVGPOOL:
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q, y += LANES) {
                            const auto [r0, r1] = window(op, r, a.height);
                            const auto [c0, c1] = window(op, q, a.width);
                            const bool most = op.kind == MAXPOOL;
                            V value = most ? load(x + (r0 * a.width + c0) * LANES) : V{};
                            for (int i = r0; i < r1; ++i)
                                for (int j = c0; j < c1; ++j) {
                                    const V pixel = load(x + (i * a.width + j) * LANES);
                                    value = most ? larger(value, pixel) : value + pixel;
                                }
                            const Scalar scale(pool_scale(op, r1 - r0, c1 - c0));
                            store(y, most ? value : value * scale);
                        }
                    break;
                case SUBSAMPLE: {
                    const int source = c - op.before;
                    const bool padded = source < 0 || source >= a.channels;
                    x = in + source * from * LANES;
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q, y += LANES) {
                            const int64_t at = (r * a.width + q) * op.stride * LANES;
                            store(y, padded ? V{} : load(x + at));
                        }
                    break;
                }
                case ADD:
                case RELU: {
                    const T* z =
                        op.kind == ADD ? data(memory, op.other) + c * from * LANES : nullptr;
                    for (int64_t i = 0; i < int64_t(pixels) * LANES; i += LANES) {
                        const V value = z ? load(x + i) + load(z + i) : load(x + i);
                        store(y + i, op.relu ? rectified(value) : value);
                    }
                    break;
                }
                case COPY:
                    std::memcpy(y, x, pixels * LANES * sizeof(T));
                    break;
                case FLATTEN:
                    std::memcpy(out + int64_t(c) * pixels * LANES, x, pixels * LANES * sizeof(T));
                    break;
            }
        }
    }
};

}  // namespace
