// Single images, [C][rows of W + halo]: a vector holds neighbouring pixels. Planes have zeros
// around them, so that a shifted plane is a shifted load; those of int8 have none (byte_images.h).
// Threads share every op.
#pragma once
#include <algorithm>
#include <array>
#include <map>
#include <memory>

#include "byte_images.h"
#include "general.h"
#include "ops.h"
#include "plan.h"
#include "pointwise.h"
#include "pools.h"
#include "threads.h"
#include "tiny.h"
#include "vectors.h"
#include "winograd_images.h"

namespace {

constexpr int NEAR_BYTES = 512 * 1024;  // what the second cache holds for sure

// NT taps of kernels by channel, of ALL or, if that is 0, of `taps`: the shifted planes stay in
// registers while all filters that use this channel take them; sums of N vectors of every filter
template <class T, int ALL, int NT, int N>
[[gnu::noinline]] void add_taps(const Op& op, const T* in, int64_t plane, int channels,
                                const int* shift, int taps, int first_tap, int first_list,
                                int last_list, T* sums) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int32_t* words = (const int32_t*)op.weight_by_channel + first_tap;
    for (int c = 0; c < channels; ++c) {
        V pixels[NT][N];
        repeat<NT>([&](auto t) FORCED {
            repeat<N>([&](auto n) FORCED {
                pixels[t][n] = *(const Loose*)(in + c * plane + shift[first_tap + t] + n * LANES);
            });
        });
        for (int list = first_list; list < last_list; ++list) {
            const int32_t* start = op.start_by_channel + int64_t(list) * channels + c;
            for (int k = start[0]; k < start[1]; ++k) {
                V* sum = (V*)sums + int64_t(op.index_by_channel[k]) * N;
                const int32_t* w = words + int64_t(k) * (ALL ? ALL : taps);
                __builtin_prefetch((const char*)w + PREFETCH);
                V acc[N];
                repeat<N>([&](auto n) FORCED { acc[n] = sum[n]; });
                repeat<NT>([&](auto t) FORCED {
                    const V weight = broadcast<T>(w + t);
                    repeat<N>([&](auto n) FORCED { acc[n] += pixels[t][n] * weight; });
                });
                repeat<N>([&](auto n) FORCED { sum[n] = acc[n]; });
            }
        }
    }
}

// All taps, as many at once as registers hold: of most sizes a whole row or the whole kernel
template <class T, int N>
void conv_vectors(const Op& op, const T* in, int64_t plane, int channels, const int* shift,
                  int first_list, int last_list, int first, int last, T* sums) {
    USE_TYPES;
    const int taps = op.rows.kernel * op.columns.kernel;
    for (int f = first; f < last; ++f)
        repeat<N>([&](auto n) FORCED { ((V*)sums)[f * N + n] = splat<T>(T(op.bias[f])); });
    int done = 0;
    const auto pass = [&](auto nt) {
        for (; done + nt <= taps; done += nt)
            add_taps<T, 0, nt, N>(op, in, plane, channels, shift, taps, done, first_list,
                                  last_list, sums);
    };
    if (taps == 9)
        return add_taps<T, 9, 9, N>(op, in, plane, channels, shift, 9, 0, first_list, last_list,
                                    sums);
    if (taps % 7 == 0) pass(Int<7>{});
    if (taps % 5 == 0) pass(Int<5>{});
    pass(Int<9>{}), pass(Int<5>{}), pass(Int<3>{}), pass(Int<1>{});
}

// N vectors of a filter with one channel, 3x3: `base` has where the first two taps of each row begin,
// and the third is LAST pixels from the first
template <class T, int LAST, int N>
FORCED inline void depthwise_3x3(const T* const (&base)[6], int64_t at,
                                 const typename Types<T>::V* weights,
                                 typename Types<T>::V (&acc)[N]) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    repeat<9>([&](auto t) FORCED {
        const T* x = base[t / 3 * 2 + t % 3 % 2] + at + t % 3 / 2 * LAST;
        repeat<N>([&](auto n) FORCED { acc[n] += *(const Loose*)(x + n * LANES) * weights[t]; });
    });
}

// Of any size
template <class T, int N>
FORCED inline void depthwise_taps(const T* x, const int* shift, int taps, const int32_t* words,
                                  typename Types<T>::V (&acc)[N]) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    for (int t = 0; t < taps; ++t) {
        const V weight = broadcast<T>(words + t);
        repeat<N>([&](auto n) FORCED {
            acc[n] += *(const Loose*)(x + shift[t] + n * LANES) * weight;
        });
    }
}

// The whole network on one image at a time
template <class T>
class Images {
    using V = typename Types<T>::V;
    using Scalar = typename Types<T>::Scalar;
    static constexpr int LANES = Types<T>::lanes;
    static constexpr bool BYTES = std::is_same_v<T, Byte>;
    const Plan& plan;
    std::vector<int64_t> starts;  // of the slots, in values
    int64_t size = 0, scratch_size = 0;  // in values, and in scalars
    std::vector<std::unique_ptr<Memory>> memories, scratch;
    std::vector<std::unique_ptr<Memory>> byte_scratch;  // of int8's convs
    std::map<const Op*, Windows> windows;               // of those
    std::vector<std::unique_ptr<PointScratch>> point_scratch;
    std::vector<std::unique_ptr<Memory>> winograd_scratch;
    int64_t winograd_size = 0;  // in bytes
    std::map<const Op*, Phases> phases;  // of convs that are not plain
    // of the pixels of a body: 1 inside the image, 0 between its rows
    std::map<std::pair<int, int>, std::unique_ptr<Memory>> inside;

    // A plane is a body of rows and a margin of zeros, whole vectors both
    int halo() const { return BYTES ? 0 : plan.halo; }
    int pitch(int width) const { return width + halo(); }
    int body(int height, int width) const { return round_up(height * pitch(width), LANES); }
    int margin(int width) const { return round_up(halo() * (pitch(width) + 1), LANES); }
    int64_t plane(int height, int width) const { return body(height, width) + margin(width); }
    // before the first plane and behind the last one: a margin, and what loads there reach beyond
    int lead(int width) const { return BYTES ? windows_reach(width) : margin(width); }
    int beyond(int width) const { return lead(width) + (BYTES ? 0 : 2 * PAIR * LANES); }

    T* data(T* memory, int t) const {
        const Tensor& a = plan.tensors[t];
        return memory + starts[a.slot] + lead(a.width) + a.first * plane(a.height, a.width);
    }

  public:
    explicit Images(const Plan& plan)
        : plan(plan), memories(plan.threads), scratch(plan.threads), byte_scratch(plan.threads),
          point_scratch(plan.threads), winograd_scratch(plan.threads) {
        for (const Slot& s : plan.slots) {
            starts.push_back(size);
            size += lead(s.width) + s.channels * plane(s.height, s.width) + beyond(s.width);
        }
        for (const Op& o : plan.ops) {
            if (o.out < 0) continue;
            const Tensor& out = plan.tensors[o.out];
            if (o.in >= 0) scratch_size = std::max(scratch_size, need(o, plan.tensors[o.in], out));
            auto& mask = inside[{out.height, out.width}];
            if (mask || BYTES) continue;
            mask = std::make_unique<Memory>(body(out.height, out.width) * sizeof(Scalar));
            for (int r = 0; r < out.height; ++r)
                std::fill_n((Scalar*)mask->data + r * pitch(out.width), out.width, Scalar(1));
        }
    }

    void prepare() {
        for (auto& memory : memories)
            if (!memory) memory = std::make_unique<Memory>(size * sizeof(T));
        for (auto& memory : scratch)
            if (!memory) memory = std::make_unique<Memory>(scratch_size * sizeof(Scalar));
        for (auto& one : winograd_scratch)
            if (!one && winograd_size) one = std::make_unique<Memory>(winograd_size);
        if (!BYTES) return PointScratch::prepare(point_scratch);
        for (auto& one : byte_scratch)
            if (!one) one = std::make_unique<Memory>(WORDS_BYTES + BYTE_SUMS_BYTES);
    }

    // One of `parts` threads that run this at once on the same worker's memory
    void run(int worker, const float* const* in, float* const* out, int64_t image, int part,
             int parts, Barrier& barrier) {
        T* memory = (T*)memories[worker]->data;
        Scalar* extra = (Scalar*)scratch[worker]->data;
        for (const Op& op : plan.ops) {
            run_op(op, worker, memory, extra, in, out, image, part, parts, barrier);
            barrier.wait(parts);
        }
    }

  private:
    // What an op needs of scratch memory, in scalars
    int64_t need(const Op& op, const Tensor& in, const Tensor& out) {
        if (op.kind == CONV && BYTES && op.flat_weight) {
            windows.try_emplace(&op, op, in, out);
            return 0;
        }
        if (op.kind == CONV && by_pairs(op, in, out))
            return int64_t(TINY_PAIRS) * in.channels * plan.threads;
        if (op.kind == CONV && by_winograd(op)) {
            winograd_size = std::max(winograd_size, winograd_vectors(in.channels, out.channels) *
                                                        VECTOR_BYTES);
            return 0;
        }
        if (op.kind == CONV && is_spatial(op, in, out)) {
            const int wide = in_halo(op, in, out) ? pitch(in.width) : 0;
            const auto made = phases.try_emplace(&op, op, in, out, LANES, wide, pitch(out.width));
            const Phases& own = made.first->second;
            const bool depthwise = is_depthwise(op, in);
            const int64_t planes = wide ? 0 : depthwise ? plan.threads : in.channels;
            return sums_size(out) * plan.threads + planes * own.count * own.plane;
        }
        const int each = op.kind == LINEAR ? round_up(in.channels, LANES)
                                           // two rows of floats, of half as many scalars
                                           : 4 * round_up(pitch(in.width), LANES);
        return int64_t(each) * plan.threads;
    }

    int64_t sums_size(const Tensor& out) const { return int64_t(out.channels) * PAIR * LANES; }

    // Whether a conv is computed as floats here, and not as 1x1
    bool is_spatial(const Op& op, const Tensor& in, const Tensor& out) const {
        return BYTES ? !op.flat_weight : op.rows.kernel > 1 || !is_plain(op, in, out);
    }

    bool by_pairs(const Op& op, const Tensor& in, const Tensor& out) const {
        return std::is_same_v<T, float> && is_tiny(op, in, out);
    }

    bool by_winograd(const Op& op) const { return std::is_same_v<T, float> && op.winograd_alone; }

    // Whether the planes' own halo is wide enough for a conv that makes planes of the same size
    bool in_halo(const Op& op, const Tensor& in, const Tensor& out) const {
        const auto reach = [](const Axis& axis) {
            return std::max(axis.pad, (axis.kernel - 1) * axis.dilation - axis.pad);
        };
        return !BYTES && op.rows.stride * op.columns.stride == 1 && in.height == out.height &&
               in.width == out.width && op.rows.pad >= 0 && op.columns.pad >= 0 &&
               std::max(reach(op.rows), reach(op.columns)) <= plan.halo;
    }

    void run_op(const Op& op, int worker, T* memory, Scalar* extra, const float* const* ins,
                float* const* outs, int64_t image, int part, int parts, Barrier& barrier) {
        const Tensor& a = plan.tensors[op.in >= 0 ? op.in : op.out];
        const Tensor& o = plan.tensors[op.out >= 0 ? op.out : op.in];
        const T* in = op.in >= 0 ? data(memory, op.in) : nullptr;
        T* out = op.out >= 0 ? data(memory, op.out) : nullptr;
        if (op.kind == CONV) {
            const int own = parts == 1 ? worker : part;
            if constexpr (std::is_same_v<T, float>)
                if (by_pairs(op, a, o)) {
                    const T* other = op.other >= 0 ? data(memory, op.other) : nullptr;
                    const int first = parts == 1 ? 0 : op.share[part];
                    const int last = parts == 1 ? o.channels : op.share[part + 1];
                    return tiny({op, in, other, out, plane(a.height, a.width),
                                 plane(o.height, o.width), pitch(a.width), a.channels},
                                first, last, extra + int64_t(part) * TINY_PAIRS * a.channels);
                }
            if constexpr (std::is_same_v<T, float>)
                if (by_winograd(op))
                    return winograd_image({op, in, op.other >= 0 ? data(memory, op.other) : nullptr,
                                           out, plane(a.height, a.width), plane(o.height, o.width),
                                           pitch(a.width), a.height, a.width, a.channels,
                                           o.channels},
                                          (V*)winograd_scratch[own]->data, part, parts);
            if (is_spatial(op, a, o)) {
                if (is_depthwise(op, a)) return depthwise(op, a, o, memory, extra, part, parts);
                return conv(op, a, o, memory, extra, part, parts, barrier);
            }
            if constexpr (BYTES) {
                const Byte* other = op.other >= 0 ? data(memory, op.other) : nullptr;
                const ByteLists lists{(const int32_t*)op.flat_weight, op.flat_start, op.flat_index};
                return byte_image({op, a, o, in, other, out, plane(a.height, a.width),
                                   plane(o.height, o.width), windows.at(&op), lists, a.channels,
                                   o.channels, 0, o.channels, is_depthwise(op, a)},
                                  (Words*)byte_scratch[own]->data, part, parts);
            } else {
                return pointwise(op, a, o, memory, *point_scratch[own], part, parts);
            }
        }
        if (op.kind == LINEAR) {
            float* scores = op.other >= 0 ? outs[op.other] + image * o.channels : nullptr;
            return linear(op, a, o, in, out, scores, extra, part, parts);
        }
        const int64_t from = plane(a.height, a.width), to = plane(o.height, o.width);
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        const V* mask =
            op.out >= 0 && !BYTES ? (const V*)inside.at({o.height, o.width})->data : nullptr;
        const int vectors = body(o.height, o.width) / LANES;
        if (op.kind == LAYERNORM)
            return layernorm<T>(op, in, out, to, a.channels, mask, split(vectors, part, parts),
                                split(vectors, part + 1, parts));
        const ImagePixels<T> layout{wide, wide_out};
        if (op.kind == GROUPNORM)
            return groupnorm(op, layout, a, in, out, from, to, part, parts);
        const int channels = op.kind == FLATTEN ? a.channels : o.channels;
        const int last = (int)split(channels, part + 1, parts);
        for (int c = (int)split(channels, part, parts); c < last; ++c) {
            const T* x = in + c * from;
            T* y = op.kind == FLATTEN ? out + int64_t(c) * a.height * a.width * to : out + c * to;
            switch (op.kind) {
                case LOAD:
                case STORE: {
                    const int64_t first = (image * o.channels + c) * o.height * o.width;
                    for (int r = 0; r < o.height; ++r)
                        if (op.kind == LOAD) {
                            const float* from = ins[op.other] + first + r * o.width;
                            for (int q = 0; q < o.width; ++q)
                                y[r * wide_out + q] = T(coded<T>(from[q], op.out_code));
                        } else {
                            float* to = outs[op.other] + first + r * o.width;
                            for (int q = 0; q < o.width; ++q)
                                to[q] = decoded<T>(float(x[r * wide + q]), op.in_code);
                        }
                    break;
                }
                case MAXPOOL:
                case AVGPOOL:
                    pool_image(op, layout, a, o, x, y, BYTES ? a.height * a.width : from,
                               extra + int64_t(part) * 4 * round_up(wide, LANES));
                    break;
                case SELECT: {
                    const int source = op.index[c];
                    select_plane(op, layout, o, source < 0 ? nullptr : in + source * from, y);
                    break;
                }
                case BILINEAR:
                    bilinear_plane(op, layout, a, o, x, y);
                    break;
                case FLATTEN:
                    for (int r = 0; r < a.height; ++r)
                        for (int q = 0; q < a.width; ++q)
                            y[(r * a.width + q) * to] = x[r * wide + q];
                    break;
                default: {
                    const T* z = nullptr;
                    V point = {};
                    if (op.other >= 0) {
                        const Tensor& b = plan.tensors[op.other];
                        z = data(memory, op.other) +
                            (b.channels == 1 ? 0 : c) * plane(b.height, b.width);
                        if (b.height * b.width < o.height * o.width) {
                            point = splat(decoded<T>(Scalar(*z), op.other_code));
                            z = nullptr;
                        }
                    }
                    elementwise(op, c, x, z, point, y, mask, vectors);
                    break;
                }
            }
        }
    }

    void linear(const Op& op, const Tensor& a, const Tensor& o, const T* in, T* out, float* scores,
                Scalar* extra, int part, int parts) {
        using Loose = typename Types<Scalar>::Loose;
        const int64_t from = plane(1, 1), to = plane(1, 1);
        Scalar* x = extra + int64_t(part) * round_up(a.channels, LANES);
        for (int c = 0; c < a.channels; ++c) x[c] = decoded<T>(Scalar(in[c * from]), op.in_code);
        const int last = (int)split(o.channels, part + 1, parts);
        for (int f = (int)split(o.channels, part, parts); f < last; ++f) {
            const Scalar* row = (const Scalar*)op.weight + int64_t(f) * a.channels;
            V sums = {};
            int c = 0;
            for (; c + LANES <= a.channels; c += LANES)
                sums += *(const Loose*)(row + c) * *(const V*)(x + c);
            float sum = op.bias[f];
            for (; c < a.channels; ++c) sum += float(row[c]) * float(x[c]);
            for (int i = 0; i < LANES; ++i) sum += float(sums[i]);
            if (op.act) {
                Types<float>::V value = splat(sum);
                activate<1>(op, f, &value);
                sum = value[0];
            }
            if (scores)
                scores[f] = sum;
            else
                out[f * to] = T(coded<T>(sum, op.out_code));
        }
    }

    // A 1x1 conv. Threads share the plane where it is large, else the filters
    void pointwise(const Op& op, const Tensor& a, const Tensor& o, T* memory,
                   const PointScratch& own, int part, int parts) {
        const int S = op.rows.stride, wide = pitch(a.width), wide_out = pitch(o.width);
        const int64_t from = plane(a.height, a.width);
        const T* in = data(memory, op.in);
        Points<T> conv = {.in = in,
                          .other = op.other >= 0 ? data(memory, op.other) : nullptr,
                          .out = data(memory, op.out),
                          .out_plane = plane(o.height, o.width),
                          .channels = a.channels, .filters = o.channels, .first = 0,
                          .last = o.channels, .op = &op,
                          .weight = (const int32_t*)op.weight,
                          .start = op.start, .order = op.order,
                          .index = (const uint8_t*)op.index,
                          .inside = (const V*)inside.at({o.height, o.width})->data};
        conv.use(own);
        const int vectors = body(o.height, o.width) / LANES;
        if (parts > 1 && vectors < 10 * parts) {
            conv.first = op.share[part], conv.last = op.share[part + 1];
            part = 0, parts = 1;
        }
        points(conv, (int)split(vectors, part, parts), (int)split(vectors, part + 1, parts),
               [&](int first, int count) {
                   return [=, &o](int channel, int n, T* tile) {
                       const T* x = in + channel * from;
                       for (int c = 0; c < n; ++c, x += from, tile += count * LANES) {
                           if (S == 1) {
                               std::memcpy(tile, x + first * LANES, count * LANES * sizeof(T));
                               continue;
                           }
                           // what lies between the rows and below the last is not used
                           int r = first * LANES / wide_out, q = first * LANES % wide_out;
                           for (int i = 0; i < count * LANES; ++r, q = 0) {
                               const int n = std::min(wide_out - q, count * LANES - i);
                               const int live = r < o.height ? std::min(n, o.width - q) : 0;
                               const T* row = x + r * S * wide + q * S;
                               for (int j = 0; j < live; ++j) tile[i + j] = row[j * S];
                               i += n;
                           }
                       }
                   };
               });
    }

    // A conv of any kind but depthwise: from the input where its halo is wide enough, else from
    // phases of it. Threads share the plane where it is large, else the filters
    void conv(const Op& op, const Tensor& a, const Tensor& o, T* memory, Scalar* extra, int part,
              int parts, Barrier& barrier) {
        const Phases& own = phases.at(&op);
        const T* in = data(memory, op.in);
        int64_t from = plane(a.height, a.width);
        const Scalar* x;
        if (own.in_place) {
            x = (const Scalar*)in;
        } else {
            Scalar* planes = extra + plan.threads * sums_size(o);
            const int last = (int)split(a.channels, part + 1, parts);
            for (int c = (int)split(a.channels, part, parts); c < last; ++c)
                split_phases(op, own, a, in + c * from, pitch(a.width),
                             planes + c * own.count * own.plane);
            barrier.wait(parts);
            x = planes + own.origin;
            from = own.count * own.plane;
        }
        Scalar* sums = extra + part * sums_size(o);
        const Results to = results(op, o, own, memory);
        const bool by_plane = own.vectors >= 8 * parts, all = by_plane || parts == 1;
        const int v1 = by_plane ? (int)split(own.vectors, part + 1, parts) : own.vectors;
        const int f0 = all ? 0 : op.share[part], f1 = all ? o.channels : op.share[part + 1];
        const int first = all ? 0 : part, last = all ? plan.threads : part + 1;
        const auto vectors = [&](auto n, int v) {
            conv_vectors<Scalar, n>(op, x + v * LANES, from, a.channels, own.shift.data(), first,
                                    last, f0, f1, sums);
            finish<n>(to, (const V*)sums + f0 * n, f0, f1, v);
        };
        int v = by_plane ? (int)split(own.vectors, part, parts) : 0;
        for (; v + PAIR <= v1; v += PAIR) vectors(Int<PAIR>{}, v);
        if (v < v1) vectors(Int<1>{}, v);
    }

    // Threads share the plane where it is large and needs no phases, as other convs do, which leave
    // it in their caches; else the channels
    void depthwise(const Op& op, const Tensor& a, const Tensor& o, T* memory, Scalar* extra,
                   int part, int parts) {
        const Phases& own = phases.at(&op);
        const Results to = results(op, o, own, memory);
        const int taps = op.rows.kernel * op.columns.kernel;
        const int64_t from = plane(a.height, a.width);
        Scalar* planes = extra + plan.threads * sums_size(o) + part * own.count * own.plane;
        const bool by_plane = own.in_place && own.vectors >= 8 * parts;
        const int v0 = by_plane ? (int)split(own.vectors, part, parts) : 0;
        const int v1 = by_plane ? (int)split(own.vectors, part + 1, parts) : own.vectors;
        const int f0 = by_plane ? 0 : (int)split(o.channels, part, parts);
        const int f1 = by_plane ? o.channels : (int)split(o.channels, part + 1, parts);
        for (int f = f0; f < f1; ++f) {
            const int k = op.start[f];
            const bool empty = k == op.start[f + 1];
            const T* in = data(memory, op.in) + (empty ? 0 : op.index[k]) * from;
            const int32_t* words = (const int32_t*)op.weight + int64_t(k) * taps;
            if (!own.in_place && !empty) split_phases(op, own, a, in, pitch(a.width), planes);
            const Scalar* x = own.in_place ? (const Scalar*)in : planes + own.origin;
            const auto all = [&](const auto& add) FORCED {
                const auto vectors = [&](auto n, int v) FORCED {
                    V acc[n];
                    repeat<n>([&](auto i) FORCED { acc[i] = splat<Scalar>(Scalar(op.bias[f])); });
                    if (!empty) add(v, acc);
                    finish<n>(to, acc, f, f + 1, v);
                };
                int v = v0;
                for (; v + 4 <= v1; v += 4) vectors(Int<4>{}, v);
                for (; v < v1; ++v) vectors(Int<1>{}, v);
            };
            const int* shift = own.shift.data();
            if (taps != 9 || empty || shift[5] - shift[3] != op.columns.stride % 2 + 1) {
                all([&](int v, auto& acc) FORCED {
                    depthwise_taps<Scalar>(x + v * LANES, shift, taps, words, acc);
                });
                continue;
            }
            V weights[9];
            const Scalar* base[6];
            repeat<9>([&](auto t) FORCED { weights[t] = broadcast<Scalar>(words + t); });
            repeat<6>([&](auto i) FORCED { base[i] = x + shift[i / 2 * 3 + i % 2]; });
            if (op.columns.stride == 1)
                all([&](int v, auto& acc) FORCED {
                    depthwise_3x3<Scalar, 2>(base, v * LANES, weights, acc);
                });
            else
                all([&](int v, auto& acc) FORCED {
                    depthwise_3x3<Scalar, 1>(base, v * LANES, weights, acc);
                });
        }
    }

    // Where the sums of a conv's filters go
    struct Results {
        const Op& op;
        const Tensor& made;
        const Phases& phases;
        T* out;
        const T* other;  // added to the outputs, or null
        int64_t plane;
        int pitch;
        const V* mask;  // of the output's plane, if the sums lie as it does, else null
        bool far;       // no cache nearby holds all filters' planes, which are written in turns
    };
    Results results(const Op& op, const Tensor& o, const Phases& own, T* memory) const {
        const bool alike = !BYTES && own.pitch == pitch(o.width);
        return {op, o, own, data(memory, op.out), op.other >= 0 ? data(memory, op.other) : nullptr,
                plane(o.height, o.width), pitch(o.width),
                alike ? (const V*)inside.at({o.height, o.width})->data : nullptr,
                o.channels * plane(o.height, o.width) * int64_t(sizeof(T)) > NEAR_BYTES};
    }

    // Sums of N vectors of filters f0 to f1 to their planes, from vector v on
    template <int N>
    static FORCED void finish(const Results& to, const V* sums, int f0, int f1, int v) {
        if (!to.mask) return finish_pieces<N>(to, sums, f0, f1, v);
        for (int f = f0; f < f1; ++f) {
            const int64_t at = f * to.plane + v * LANES;
            V values[N];
            if (to.far)
                repeat<N>([&](auto n) FORCED {
                    __builtin_prefetch(to.out + at + (N + n) * LANES, 1);
                });
            repeat<N>([&](auto n) FORCED { values[n] = sums[(f - f0) * N + n]; });
            if (to.other)
                repeat<N>([&](auto n) FORCED { values[n] += load(to.other + at + n * LANES); });
            activate<N>(to.op, f, values);
            repeat<N>([&](auto n) FORCED {
                store(to.out + at + n * LANES, to.mask[v + n] == V{} ? V{} : values[n]);
            });
        }
    }

    // Row by row, where these lie otherwise
    template <int N>
    [[gnu::noinline]] static void finish_pieces(const Results& to, const V* sums, int f0, int f1,
                                                int v) {
        std::array<Piece, N * LANES> pieces;
        const int count =
            to.phases.pieces(to.made, to.pitch, v * LANES, N * LANES, pieces.data());
        for (int f = f0; f < f1; ++f) {
            alignas(64) T made[N * LANES] = {};
            V values[N];
            for (int i = 0; to.other && i < count; ++i)
                std::copy_n(to.other + f * to.plane + pieces[i].to, pieces[i].count,
                            made + pieces[i].from);
            repeat<N>([&](auto n) FORCED {
                values[n] = sums[(f - f0) * N + n];
                if (to.other) values[n] += decoded<T>(load(made + n * LANES), to.op.other_code);
            });
            activate<N>(to.op, f, values);
            repeat<N>([&](auto n) FORCED {
                store(made + n * LANES, coded<T>(values[n], to.op.out_code));
            });
            for (int i = 0; i < count; ++i) {
                T* out = to.out + f * to.plane + pieces[i].to;
                std::copy_n(made + pieces[i].from, pieces[i].count, out);
                __builtin_prefetch(out + N * LANES, 1);
            }
        }
    }
};

}  // namespace
