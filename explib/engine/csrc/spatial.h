// Single images, [C][rows of W + halo]: a vector holds neighbouring pixels. Planes have zeros
// around them, so that a shifted plane is a shifted load; those of int8 have none (byte_images.h).
// Threads share every op.
#pragma once
#include <algorithm>
#include <map>
#include <memory>

#include "byte_depthwise.h"
#include "byte_images.h"
#include "byte_tiny.h"
#include "depthwise.h"
#include "general.h"
#include "lanes.h"
#include "ops.h"
#include "plan.h"
#include "planes.h"
#include "pointwise_images.h"
#include "pools.h"
#include "threads.h"
#include "tiny.h"
#include "vectors.h"
#include "winograd_four.h"

namespace {

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
    int beyond(int width) const { return lead(width) + (BYTES ? 4 * VECTOR_BYTES : 4 * LANES); }

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

    // ops: of the plan, or some that store
    void run(const Op* ops, size_t count, const float* const* in, float* const* out, int64_t image,
             const Part& by) {
        T* memory = (T*)memories[by.worker]->data;
        Scalar* extra = (Scalar*)scratch[by.worker]->data;
        for (size_t i = 0; i < count; ++i) {
            run_op(ops[i], by.worker, memory, extra, in, out, image, by.part, by.parts, by.barrier);
            by.barrier.wait(by.parts);
        }
    }

  private:
    // How a conv is computed
    enum Way { TINY, WINOGRAD, STRIDED, DEPTHWISE, PLANES, AS_BYTES, DEPTHWISE_BYTES, POINTWISE };
    Way way(const Op& op, const Tensor& in, const Tensor& out) const {
        constexpr bool FLOATS = std::is_same_v<T, float>;
        if (BYTES && op.flat_weight)
            return op.flat_bias ? TINY : is_depthwise(op, in) ? DEPTHWISE_BYTES : AS_BYTES;
        if (FLOATS && is_tiny(op, in, out)) return TINY;
        if (FLOATS && op.winograd_alone) return WINOGRAD;
        if (is_depthwise(op, in))
            return !BYTES && strided_kernel(op, in, out, halo()) ? STRIDED : DEPTHWISE;
        return BYTES || op.rows.kernel > 1 || !is_plain(op, in, out) ? PLANES : POINTWISE;
    }

    // What an op needs of scratch memory, in scalars
    int64_t need(const Op& op, const Tensor& in, const Tensor& out) {
        if (op.kind != CONV) {
            const int64_t each = op.kind == LINEAR ? round_up(in.channels, LANES)
                                                   : pool_scratch<Scalar>(pitch(in.width));
            return each * plan.threads;
        }
        const auto as_phases = [&]() -> const Phases& {
            const int wide = in_halo(op, in, out) ? pitch(in.width) : 0;
            return phases.try_emplace(&op, op, in, out, LANES, wide, pitch(out.width))
                .first->second;
        };
        switch (way(op, in, out)) {
            case TINY: return BYTES ? 0 : int64_t(TINY_PAIRS) * in.channels * plan.threads;
            case WINOGRAD:
                winograd_size = std::max(winograd_size, winograd_vectors(in.channels, out.channels) *
                                                            VECTOR_BYTES);
                return 0;
            case DEPTHWISE: return depthwise_scratch(as_phases()) * plan.threads;
            case PLANES: return planes_scratch<T>(in, out, as_phases(), plan.threads);
            case AS_BYTES:
                windows.try_emplace(&op, op, in, out);
                return taken(op, in, plane(out.height, out.width)) / int64_t(sizeof(Scalar)) + 1;
            case DEPTHWISE_BYTES: return Padded(op, in).scratch() / sizeof(Scalar) * plan.threads;
            case POINTWISE: return taken(op, in, plane(out.height, out.width));
            default: return 0;
        }
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
        const V* mask =
            op.out >= 0 && !BYTES ? (const V*)inside.at({o.height, o.width})->data : nullptr;
        if (op.kind == CONV) {
            const T* other = op.other >= 0 ? data(memory, op.other) : nullptr;
            return conv({op, a, o, in, other, out, plane(a.height, a.width),
                         plane(o.height, o.width), pitch(a.width), pitch(o.width), mask},
                        parts == 1 ? worker : part, extra, part, parts, barrier);
        }
        if (op.kind == LINEAR) {
            float* scores = op.other >= 0 ? outs[op.other] + image * o.channels : nullptr;
            return linear(op, a, o, in, out, scores, extra, part, parts);
        }
        const int64_t from = plane(a.height, a.width), to = plane(o.height, o.width);
        const int wide = pitch(a.width), wide_out = pitch(o.width);
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
                               extra + part * pool_scratch<Scalar>(wide));
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

    // own: whose scratch memory this thread uses
    void conv(ImageConv<T> a, int own, Scalar* extra, int part, int parts,
              Barrier& barrier) {
        const Op& op = a.op;
        const int channels = a.source.channels, filters = a.made.channels;
        switch (way(op, a.source, a.made)) {
            case TINY: {
                const int first = parts == 1 ? 0 : op.share[part];
                const int last = parts == 1 ? filters : op.share[part + 1];
                if constexpr (BYTES)
                    byte_tiny(a, first, last, (int32_t*)byte_scratch[own]->data);
                else if constexpr (std::is_same_v<T, float>)
                    tiny(a, first, last, extra + int64_t(part) * TINY_PAIRS * channels);
                return;
            }
            case WINOGRAD:
                if constexpr (std::is_same_v<T, float>) {
                    const bool four = winograd_four(a.made.height, a.made.width);
                    const auto memory = (V*)winograd_scratch[own]->data;
                    (four ? winograd_fours : winograd_image)({a}, memory, part, parts);
                }
                return;
            case STRIDED:
                if constexpr (!BYTES) depthwise_strided(a, op.rows.kernel, part, parts);
                return;
            case DEPTHWISE: {
                const Phases& made = phases.at(&op);
                return depthwise(a, made, extra + part * depthwise_scratch(made), part, parts);
            }
            case PLANES:
                return conv_planes(a, phases.at(&op), extra, plan.threads, part, parts, barrier);
            case AS_BYTES:
                if constexpr (BYTES) {
                    take_pixels(a, (Byte*)extra, part, parts, barrier);
                    const ByteLists lists{(const int32_t*)op.flat_weight, op.flat_start,
                                          op.flat_index};
                    byte_image({op, a.source, a.made, a.in, a.other, a.out, a.in_plane,
                                a.out_plane, windows.at(&op), lists, channels, filters, 0, filters},
                               (Words*)byte_scratch[own]->data, part, parts);
                }
                return;
            case DEPTHWISE_BYTES:
                if constexpr (BYTES)
                    byte_depthwise(a, (Byte*)extra + part * Padded(op, a.source).scratch(), part,
                                   parts);
                return;
            case POINTWISE:
                if constexpr (!BYTES) {
                    take_pixels(a, extra, part, parts, barrier);
                    pointwise_image(a, body(a.made.height, a.made.width) / LANES,
                                    *point_scratch[own], part, parts);
                }
        }
    }
};

}  // namespace
