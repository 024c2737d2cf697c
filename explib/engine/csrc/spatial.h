// Single images, [C][rows of W + halo]: a vector holds neighbouring pixels. Planes have zeros
// around them, so that a shifted plane is a shifted load; threads share every op.
#pragma once
#include <algorithm>
#include <map>
#include <memory>

#include "plan.h"
#include "pointwise.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int MAX_TAPS = 49;
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
    const int taps = op.kernel * op.kernel;
    V acc[N];
    repeat<N>([&](auto n) FORCED { acc[n] = splat<T>(T(op.bias[f])); });
    for (int k = op.start[f]; k < op.start[f + 1]; ++k) {
        const T* x = in + ((const int32_t*)op.index)[k] * plane;
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
    static constexpr int LANES = Types<T>::lanes;
    const Plan& plan;
    std::vector<int64_t> starts;  // of the slots, in scalars
    int64_t size = 0, scratch_size = 0;
    std::vector<std::unique_ptr<Memory>> memories, scratch;
    std::vector<std::unique_ptr<PointScratch>> point_scratch;
    // of the pixels of a body: 1 inside the image, 0 between its rows
    std::map<std::pair<int, int>, std::unique_ptr<Memory>> inside;

    // A plane is a body of rows and a margin of zeros, whole vectors both
    int pitch(int width) const { return width + plan.halo; }
    int body(int height, int width) const { return round_up(height * pitch(width), LANES); }
    int margin(int width) const { return round_up(plan.halo * (pitch(width) + 1), LANES); }
    int64_t plane(int height, int width) const { return body(height, width) + margin(width); }

    T* data(T* memory, int t) const {
        const Tensor& a = plan.tensors[t];
        return memory + starts[a.slot] + margin(a.width) + a.first * plane(a.height, a.width);
    }

  public:
    explicit Images(const Plan& plan)
        : plan(plan), memories(plan.threads), scratch(plan.threads), point_scratch(plan.threads) {
        for (const Slot& s : plan.slots) {
            starts.push_back(size);
            // two margins more: before the first plane, and for loads that begin near the end
            size += s.channels * plane(s.height, s.width) + 2 * margin(s.width) + 2 * PAIR * LANES;
        }
        for (const Op& o : plan.ops) {
            if (o.in < 0 || o.out < 0) continue;
            const Tensor &in = plan.tensors[o.in], &out = plan.tensors[o.out];
            const int each = o.kind == CONV     ? out.channels * PAIR * LANES
                             : o.kind == LINEAR ? round_up(in.channels, LANES)
                                                : round_up(pitch(in.width), LANES);
            int64_t need = int64_t(each) * plan.threads;
            if (o.kind == CONV && o.stride > 1)
                need += int64_t(o.stride) * o.stride * in.channels * plane(out.height, out.width) +
                        2 * margin(out.width) + 2 * PAIR * LANES;
            scratch_size = std::max(scratch_size, need);
            auto& mask = inside[{out.height, out.width}];
            if (mask) continue;
            mask = std::make_unique<Memory>(body(out.height, out.width) * sizeof(T));
            for (int r = 0; r < out.height; ++r)
                std::fill_n((T*)mask->data + r * pitch(out.width), out.width, T(1));
        }
    }

    void prepare() {
        for (auto& memory : memories)
            if (!memory) memory = std::make_unique<Memory>(size * sizeof(T));
        for (auto& memory : scratch)
            if (!memory) memory = std::make_unique<Memory>(scratch_size * sizeof(T));
        PointScratch::prepare(point_scratch);
    }

    // One of `parts` threads that run this at once on the same worker's memory
    void run(int worker, const float* const* in, float* const* out, int64_t image, int part,
             int parts, Barrier& barrier) {
        T* memory = (T*)memories[worker]->data;
        T* extra = (T*)scratch[worker]->data;
        for (const Op& op : plan.ops) {
            run_op(op, worker, memory, extra, in, out, image, part, parts, barrier);
            barrier.wait(parts);
        }
    }

  private:
    // First over rows, whole vectors at a time, then over columns
    void pool_plane(const Op& op, const Tensor& a, const Tensor& o, const T* in, T* out,
                    T* row) const {
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        const bool most = op.kind == MAXPOOL;
        for (int r = 0; r < o.height; ++r) {
            const auto [r0, r1] = window(op, r, a.height);
            std::copy_n(in + r0 * wide, a.width, row);
            for (int i = r0 + 1; i < r1; ++i)
                for (int q = 0; q < a.width; ++q) {
                    const T x = in[i * wide + q];
                    row[q] = most ? larger(row[q], x) : row[q] + x;
                }
            for (int q = 0; q < o.width; ++q) {
                const auto [c0, c1] = window(op, q, a.width);
                T value = row[c0];
                for (int c = c0 + 1; c < c1; ++c)
                    value = most ? larger(value, row[c]) : value + row[c];
                out[r * wide_out + q] = most ? value : value * T(pool_scale(op, r1 - r0, c1 - c0));
            }
        }
    }

    void run_op(const Op& op, int worker, T* memory, T* extra, const float* const* ins, float* const* outs,
                int64_t image, int part, int parts, Barrier& barrier) {
        const Tensor& a = plan.tensors[op.in >= 0 ? op.in : op.out];
        const Tensor& o = plan.tensors[op.out >= 0 ? op.out : op.in];
        const T* in = op.in >= 0 ? data(memory, op.in) : nullptr;
        T* out = op.out >= 0 ? data(memory, op.out) : nullptr;
        if (op.kind == CONV && op.kernel == 1)
            return pointwise(op, a, o, memory, *point_scratch[parts == 1 ? worker : part], part,
                             parts);
        if (op.kind == CONV) return conv(op, a, o, memory, extra, part, parts, barrier);
        if (op.kind == LINEAR) {
            float* scores = op.other >= 0 ? outs[op.other] + image * o.channels : nullptr;
            return linear(op, a, o, in, out, scores, extra, part, parts);
        }
        const int64_t from = plane(a.height, a.width), to = plane(o.height, o.width);
        const int wide = pitch(a.width), wide_out = pitch(o.width);
        const int channels = op.kind == FLATTEN ? a.channels : o.channels;
        const int last = (int)split(channels, part + 1, parts);
        for (int c = (int)split(channels, part, parts); c < last; ++c) {
            const T* x = in + c * from;
            T* y = op.kind == FLATTEN ? out + int64_t(c) * a.height * a.width * to : out + c * to;
            switch (op.kind) {
                case LOAD:
                case STORE:
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q) {
                            const int64_t at =
                                ((image * o.channels + c) * o.height + r) * o.width + q;
                            if (op.kind == LOAD)
                                y[r * wide_out + q] = T(ins[op.other][at]);
                            else
                                outs[op.other][at] = float(x[r * wide + q]);
                        }
                    break;
                case MAXPOOL:
                case AVGPOOL:
                    pool_plane(op, a, o, x, y, extra + int64_t(part) * round_up(wide, LANES));
                    break;
                case SUBSAMPLE: {
                    const int source = c - op.before;
                    const bool padded = source < 0 || source >= a.channels;
                    for (int r = 0; r < o.height; ++r)
                        for (int q = 0; q < o.width; ++q)
                            y[r * wide_out + q] =
                                padded ? T(0)
                                       : in[source * from + (r * op.stride) * wide + q * op.stride];
                    break;
                }
                case FLATTEN:
                    for (int r = 0; r < a.height; ++r)
                        for (int q = 0; q < a.width; ++q)
                            y[(r * a.width + q) * to] = x[r * wide + q];
                    break;
                case ADD:
                case RELU:
                case COPY: {
                    const T* z = op.kind == ADD ? data(memory, op.other) + c * from : nullptr;
                    for (int i = 0; i < body(a.height, a.width); i += LANES) {
                        V value = *(const V*)(x + i);
                        if (z) value += *(const V*)(z + i);
                        *(V*)(y + i) = op.relu ? rectified(value) : value;
                    }
                    break;
                }
            }
        }
    }

    void linear(const Op& op, const Tensor& a, const Tensor& o, const T* in, T* out, float* scores,
                T* extra, int part, int parts) {
        using Loose = typename Types<T>::Loose;
        const int64_t from = plane(1, 1), to = plane(1, 1);
        T* x = extra + int64_t(part) * round_up(a.channels, LANES);
        for (int c = 0; c < a.channels; ++c) x[c] = in[c * from];
        const int last = (int)split(o.channels, part + 1, parts);
        for (int f = (int)split(o.channels, part, parts); f < last; ++f) {
            const T* row = (const T*)op.weight + int64_t(f) * a.channels;
            V sums = {};
            int c = 0;
            for (; c + LANES <= a.channels; c += LANES)
                sums += *(const Loose*)(row + c) * *(const V*)(x + c);
            float sum = op.bias[f];
            for (; c < a.channels; ++c) sum += float(row[c]) * float(x[c]);
            for (int i = 0; i < LANES; ++i) sum += float(sums[i]);
            if (op.relu && sum < 0) sum = 0;
            if (scores)
                scores[f] = sum;
            else
                out[f * to] = T(sum);
        }
    }

    // A 1x1 conv. Threads share the plane where it is large, else the filters
    void pointwise(const Op& op, const Tensor& a, const Tensor& o, T* memory,
                   const PointScratch& own, int part, int parts) {
        const int S = op.stride, wide = pitch(a.width), wide_out = pitch(o.width);
        const int64_t from = plane(a.height, a.width);
        const T* in = data(memory, op.in);
        Points<T> conv = {.in = in,
                          .other = op.other >= 0 ? data(memory, op.other) : nullptr,
                          .out = data(memory, op.out),
                          .out_plane = plane(o.height, o.width),
                          .channels = a.channels, .filters = o.channels, .first = 0,
                          .last = o.channels, .relu = bool(op.relu),
                          .weight = (const int32_t*)op.weight, .bias = op.bias,
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
        const int K = op.kernel, S = op.stride, wide = pitch(o.width);
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
        int shift[MAX_TAPS];
        for (int t = 0; t < K * K; ++t) {
            const int dy = t / K - op.pad, dx = t % K - op.pad;
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
            return;
        }
        for (int f = f0; f < f1; ++f) {
            int v = v0;
            alignas(64) T one[4 * LANES];
            for (; v + 4 <= v1; v += 4) {
                conv_filter<T, 4>(op, in + v * LANES, from, shift, f, one);
                finish<4>(op, o, mask, memory, one, f, f + 1, v);
            }
            for (; v < v1; ++v) {
                conv_filter<T, 1>(op, in + v * LANES, from, shift, f, one);
                finish<1>(op, o, mask, memory, one, f, f + 1, v);
            }
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
                if (op.relu) value = rectified(value);
                *(V*)(out + f * to + n * LANES) = mask[v + n] == V{} ? V{} : value;
            });
    }
};

}  // namespace
