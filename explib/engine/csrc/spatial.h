// Single images, [C][rows of W + halo]: a vector holds neighbouring pixels. Planes have zeros
// around them, so that a shifted plane is a shifted load; those of int8 have none (byte_images.h).
// Threads share every op.
#pragma once
#include <algorithm>
#include <map>
#include <memory>

#include "byte_images.h"
#include "general.h"
#include "ops.h"
#include "plan.h"
#include "pointwise.h"
#include "pools.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int FLAT = 2048;  // about so many outputs of a filter at once, of convs of any kind
constexpr int PREFETCH = 1024;  // bytes of weights ahead, which are used once and in order

// Kernels of NT taps by channel: the shifted planes stay in registers while all filters that use
// this channel take them; the sums of N vectors of every filter lie in `sums`.
template <class T, int NT, int N>
void conv_vectors(const Op& op, const T* in, int64_t plane, int channels, const int* shift,
                  int first_list, int last_list, int first, int last, T* sums) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int32_t* words = (const int32_t*)op.weight_by_channel;
    for (int f = first; f < last; ++f)
        repeat<N>([&](auto n) FORCED { ((V*)sums)[f * N + n] = splat<T>(T(op.bias[f])); });
    for (int c = 0; c < channels; ++c) {
        V pixels[NT][N];
        repeat<NT>([&](auto t) FORCED {
            repeat<N>([&](auto n) FORCED {
                pixels[t][n] = *(const Loose*)(in + c * plane + shift[t] + n * LANES);
            });
        });
        for (int list = first_list; list < last_list; ++list) {
            const int32_t* start = op.start_by_channel + int64_t(list) * channels + c;
            for (int k = start[0]; k < start[1]; ++k) {
                V* sum = (V*)sums + int64_t(op.index_by_channel[k]) * N;
                const int32_t* w = words + int64_t(k) * NT;
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

// Kernels of any size by filter: N vectors of one filter's sums stay in registers
template <class T, int N>
void conv_filter(const Op& op, const T* in, int64_t plane, const int* shift, int f, T* sums) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int taps = op.rows.kernel * op.columns.kernel;
    V acc[N];
    repeat<N>([&](auto n) FORCED { acc[n] = splat<T>(T(op.bias[f])); });
    for (int k = op.start[f]; k < op.start[f + 1]; ++k) {
        const T* x = in + op.index[k] * plane;
        const int32_t* w = (const int32_t*)op.weight + int64_t(k) * taps;
        for (int t = 0; t < taps; ++t) {
            const V weight = broadcast<T>(w + t);
            repeat<N>([&](auto n)
                          FORCED { acc[n] += *(const Loose*)(x + shift[t] + n * LANES) * weight; });
        }
    }
    repeat<N>([&](auto n) FORCED { ((V*)sums)[n] = acc[n]; });
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
          point_scratch(plan.threads) {
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
        if (op.kind == CONV && is_general(op, in, out)) {
            const int wide = in_halo(op, in, out) ? pitch(in.width) : 0;
            const Phases& own = phases.try_emplace(&op, op, in, out, LANES, wide).first->second;
            const int64_t planes = wide ? 0
                                   : is_depthwise(op, in) ? own.count * plan.threads
                                                          : own.count * int64_t(in.channels);
            return flat(own) * plan.threads + planes * own.plane;
        }
        const int each = op.kind == CONV     ? out.channels * PAIR * LANES
                         : op.kind == LINEAR ? round_up(in.channels, LANES)
                                             // two rows of floats, of half as many scalars
                                             : 4 * round_up(pitch(in.width), LANES);
        int64_t size = int64_t(each) * plan.threads;
        if (op.kind == CONV && op.rows.kernel == 3 && op.rows.stride > 1)
            size += int64_t(op.rows.stride) * op.rows.stride * in.channels *
                        plane(out.height, out.width) +
                    2 * margin(out.width) + 2 * PAIR * LANES;
        return size;
    }

    bool is_general(const Op& op, const Tensor& in, const Tensor& out) const {
        return BYTES ? !op.flat_weight : !is_plain(op, in, out);
    }

    // Rows of a filter's outputs at once, in scalars: at least one row and what vectors add
    int64_t flat(const Phases& own) const {
        return round_up(std::max(FLAT, own.pitch), LANES) + LANES;
    }

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
            if (is_general(op, a, o))
                return general(op, a, o, memory, extra, part, parts, barrier);
            if constexpr (BYTES) {
                const Byte* other = op.other >= 0 ? data(memory, op.other) : nullptr;
                const ByteLists lists{(const int32_t*)op.flat_weight, op.flat_start, op.flat_index};
                return byte_image({op, a, o, in, other, out, plane(a.height, a.width),
                                   plane(o.height, o.width), windows.at(&op), lists, a.channels,
                                   o.channels, 0, o.channels, is_depthwise(op, a)},
                                  (Words*)byte_scratch[own]->data, part, parts);
            } else {
                if (op.rows.kernel == 1)
                    return pointwise(op, a, o, memory, *point_scratch[own], part, parts);
                return conv(op, a, o, memory, extra, part, parts, barrier);
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
                          .start = op.start, .index = (const uint8_t*)op.index,
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

    void conv(const Op& op, const Tensor& a, const Tensor& o, T* memory, T* extra, int part,
              int parts, Barrier& barrier) {
        const T* in = data(memory, op.in);
        const int K = op.rows.kernel, S = op.rows.stride, wide = pitch(o.width);
        const int64_t to = plane(o.height, o.width);
        int64_t from = plane(a.height, a.width);
        const int32_t* share = op.share;
        // A stride becomes S * S planes of the output's size, one for each phase of the input
        T* phases = extra + int64_t(o.channels) * PAIR * LANES * plan.threads + margin(o.width);
        if (S > 1) {
            const int last = (int)split(a.channels, part + 1, parts);
            for (int c = (int)split(a.channels, part, parts); c < last; ++c)
                for (int phase = 0; phase < (K == 1 ? 1 : S * S); ++phase)
                    split_phase(in + c * from, phases + (int64_t(c) * S * S + phase) * to, a, o, S,
                                phase / S, phase % S);
            if (last == a.channels) {
                T* end = phases + int64_t(S) * S * a.channels * to - margin(o.width);
                std::fill_n(end, 2 * margin(o.width), T(0));
            }
            barrier.wait(parts);
            in = phases;
            from = int64_t(S) * S * to;
        }
        int shift[9];
        for (int t = 0; t < K * K; ++t) {
            const int dy = t / K - K / 2, dx = t % K - K / 2;
            const int ky = dy >= 0 ? dy / S : -((S - 1 - dy) / S),
                      kx = dx >= 0 ? dx / S : -((S - 1 - dx) / S);
            const int64_t phase = (dy - ky * S) * S + dx - kx * S;
            shift[t] = int(phase * to) + ky * wide + kx;
        }
        const V* mask = (const V*)inside.at({o.height, o.width})->data;
        const int vectors = body(o.height, o.width) / LANES;
        T* sums = extra + int64_t(part) * o.channels * PAIR * LANES;
        // Threads share the plane where it is large, else the filters
        const bool by_plane = vectors >= 8 * parts;
        const int v0 = by_plane ? (int)split(vectors, part, parts) : 0;
        const int v1 = by_plane ? (int)split(vectors, part + 1, parts) : vectors;
        const int f0 = by_plane || parts == 1 ? 0 : share[part];
        const int f1 = by_plane || parts == 1 ? o.channels : share[part + 1];
        const int first = by_plane || parts == 1 ? 0 : part;
        const int last = by_plane || parts == 1 ? plan.threads : part + 1;
        if (K == 3) {
            int v = v0;
            for (; v + PAIR <= v1; v += PAIR) {
                conv_vectors<T, 9, PAIR>(op, in + v * LANES, from, a.channels, shift, first, last,
                                         f0, f1, sums);
                finish<PAIR>(op, o, mask, memory, sums + int64_t(f0) * PAIR * LANES, f0, f1, v);
            }
            if (PAIR > 1 && v < v1) {
                conv_vectors<T, 9, 1>(op, in + v * LANES, from, a.channels, shift, first, last, f0,
                                      f1, sums);
                finish<1>(op, o, mask, memory, sums + int64_t(f0) * LANES, f0, f1, v);
            }
        }
    }

    // Vectors v0 to v1 of the outputs of a filter, from planes of the output's shape
    void filter(const Op& op, const Tensor& o, T* memory, const T* in, int64_t from,
                const int* shift, int f, int v0, int v1) {
        const V* mask = (const V*)inside.at({o.height, o.width})->data;
        alignas(64) T one[4 * LANES];
        int v = v0;
        for (; v + 4 <= v1; v += 4) {
            conv_filter<T, 4>(op, in + v * LANES, from, shift, f, one);
            finish<4>(op, o, mask, memory, one, f, f + 1, v);
        }
        for (; v < v1; ++v) {
            conv_filter<T, 1>(op, in + v * LANES, from, shift, f, one);
            finish<1>(op, o, mask, memory, one, f, f + 1, v);
        }
    }

    // A conv of any kind: from the input where its halo is wide enough, else from phases of it.
    // Threads share the channels of depthwise ones, else the rows where there are many, else filters
    void general(const Op& op, const Tensor& a, const Tensor& o, T* memory, Scalar* extra,
                 int part, int parts, Barrier& barrier) {
        const Phases& own = phases.at(&op);
        const bool halo = in_halo(op, a, o), depthwise = is_depthwise(op, a);
        const bool by_row = !depthwise && o.height >= 4 * parts;
        const int f0 = depthwise ? (int)split(o.channels, part, parts)
                       : by_row || parts == 1 ? 0 : op.share[part];
        const int f1 = depthwise ? (int)split(o.channels, part + 1, parts)
                       : by_row || parts == 1 ? o.channels : op.share[part + 1];
        const int64_t from = plane(a.height, a.width);
        const T* in = data(memory, op.in);
        if constexpr (!BYTES) if (halo) {
            const int vectors = body(o.height, o.width) / LANES;
            const int v0 = by_row ? (int)split(vectors, part, parts) : 0;
            const int v1 = by_row ? (int)split(vectors, part + 1, parts) : vectors;
            for (int f = f0; f < f1; ++f)
                filter(op, o, memory, in, from, own.shift.data(), f, v0, v1);
            return;
        }
        Scalar* sums = extra + part * flat(own);
        Scalar* planes = extra + plan.threads * flat(own);
        if (depthwise) {
            planes += int64_t(part) * own.count * own.plane;
            for (int f = f0; f < f1; ++f) {
                for (int k = op.start[f]; k < op.start[f + 1]; ++k)
                    split_phases(op, own, a, in + op.index[k] * from, pitch(a.width), planes);
                flat_rows(op, o, own, memory, planes, 0, f, f + 1, 0, o.height, sums);
            }
            return;
        }
        const int64_t step = own.count * own.plane;
        const int last = (int)split(a.channels, part + 1, parts);
        for (int c = (int)split(a.channels, part, parts); c < last; ++c)
            split_phases(op, own, a, in + c * from, pitch(a.width), planes + c * step);
        barrier.wait(parts);
        const int r0 = by_row ? (int)split(o.height, part, parts) : 0;
        const int r1 = by_row ? (int)split(o.height, part + 1, parts) : o.height;
        flat_rows(op, o, own, memory, planes, step, f0, f1, r0, r1, sums);
    }

    // Rows r0 to r1 of filters f0 to f1, from phases: a few rows of every filter, then the next
    void flat_rows(const Op& op, const Tensor& o, const Phases& own, T* memory, const Scalar* in,
                   int64_t step, int f0, int f1, int r0, int r1, Scalar* sums) {
        const int rows = std::max(1, FLAT / own.pitch);
        for (int r = r0; r < r1; r += rows) {
            const int count = std::min(rows, r1 - r);
            const int vectors = round_up((count - 1) * own.pitch + o.width, LANES) / LANES;
            const Scalar* x = in + own.origin + int64_t(r) * own.pitch;
            for (int f = f0; f < f1; ++f) {
                int v = 0;
                for (; v + 4 <= vectors; v += 4)
                    conv_filter<Scalar, 4>(op, x + v * LANES, step, own.shift.data(), f,
                                           sums + v * LANES);
                for (; v < vectors; ++v)
                    conv_filter<Scalar, 1>(op, x + v * LANES, step, own.shift.data(), f,
                                           sums + v * LANES);
                for (int i = 0; i < count; ++i)
                    finish_row(op, o, memory, sums + i * own.pitch, f, r + i);
            }
        }
    }

    void finish_row(const Op& op, const Tensor& o, T* memory, const Scalar* sums, int f, int row) {
        using Loose = typename Types<Scalar>::Loose;
        const int64_t at = f * plane(o.height, o.width) + int64_t(row) * pitch(o.width);
        const T* other = op.other >= 0 ? data(memory, op.other) + at : nullptr;
        T* out = data(memory, op.out) + at;
        for (int q = 0; q < o.width; q += CHUNK * LANES) {
            const int scalars = std::min(CHUNK * LANES, o.width - q);
            alignas(64) T made[CHUNK * LANES] = {};  // rows begin anywhere
            V values[CHUNK] = {};
            if (other) std::memcpy(made, other + q, scalars * sizeof(T));
            for (int i = 0; i * LANES < scalars; ++i) {
                values[i] = *(const Loose*)(sums + q + i * LANES);
                if (other) values[i] += decoded<T>(load(made + i * LANES), op.other_code);
            }
            activate<CHUNK>(op, f, values);
            for (int i = 0; i * LANES < scalars; ++i)
                store(made + i * LANES, coded<T>(values[i], op.out_code));
            std::memcpy(out + q, made, scalars * sizeof(T));
        }
    }

    void split_phase(const T* in, T* out, const Tensor& a, const Tensor& o, int S, int row,
                     int col) {
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        std::fill(out - margin(o.width), out + body(o.height, o.width), T(0));
        for (int r = 0; r < o.height && r * S + row < a.height; ++r)
            for (int q = 0; q < o.width && q * S + col < a.width; ++q)
                out[r * wide_out + q] = in[(r * S + row) * wide + q * S + col];
    }

    // Sums of N vectors of filters f0 to f1 to their planes, from vector v on; zeros between rows
    template <int N>
    void finish(const Op& op, const Tensor& o, const V* mask, T* memory, const T* sums, int f0,
                int f1, int v) {
        const int64_t to = plane(o.height, o.width);
        T* out = data(memory, op.out) + v * LANES;
        const T* other = op.other >= 0 ? data(memory, op.other) + v * LANES : nullptr;
        for (int f = f0; f < f1; ++f)
            repeat<N>([&](auto n) FORCED {
                V value = ((const V*)sums)[(f - f0) * N + n];
                if (other) value += *(const V*)(other + f * to + n * LANES);
                activate<1>(op, f, &value);
                *(V*)(out + f * to + n * LANES) = mask[v + n] == V{} ? V{} : value;
            });
    }
};

}  // namespace
