// What plan.py hands over: ops on tensors that lie in slots of memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

extern "C" {
struct Slot {  // memory of one size; spatial planes keep their zeros since only equals share a slot
    int32_t channels, height, width;
};
struct Tensor {  // `channels` of a slot from `first` on
    int32_t slot, first, channels, height, width;
};
struct Op {
    // tensors; -1: none. LOAD, STORE, LINEAR: `other` is an argument, a LINEAR's that of its result
    int32_t kind, in, other, out;
    int32_t kernel, stride, pad, relu;
    int32_t before;        // SUBSAMPLE: zero channels in front. AVGPOOL: whether padding counts
    const float* bias;     // (F,)
    const void* weight;    // kernels by filter, each K * K words; LINEAR: scalars (F, C)
    const int32_t* start;  // (F + 1,) where a filter's kernels start
    const void* index;     // the channel of each kernel, int32_t; of a 1x1 conv in its chunk, uint8_t
    // bfloat16 only: the same kernels, two of a filter at once, (F + 1,) and two channels for each
    const void* pair_weight;
    const int32_t* pair_start;
    const void* pair_index;
    // the same kernels by thread, whose filters are `share`, and in that by channel
    const void* weight_by_channel;
    const int32_t* start_by_channel;  // (threads * C + 1,)
    const int32_t* index_by_channel;  // the filter of each kernel
    const int32_t* share;             // (threads + 1,)
};
}

namespace {

enum Kind { LOAD, STORE, CONV, LINEAR, MAXPOOL, AVGPOOL, SUBSAMPLE, ADD, RELU, COPY, FLATTEN };

struct Plan {
    std::vector<Op> ops;
    std::vector<Tensor> tensors;
    std::vector<Slot> slots;
    int halo;  // how far convs look beyond a plane, in pixels
    int threads;
};

// The rows or columns of a pooling window, without those outside
inline std::pair<int, int> window(const Op& op, int at, int size) {
    const int start = at * op.stride - op.pad;
    return {std::max(start, 0), std::min(start + op.kernel, size)};
}

inline float pool_scale(const Op& op, int rows, int columns) {
    return 1.0f / (op.before ? op.kernel * op.kernel : rows * columns);
}

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }
inline int64_t split(int64_t n, int part, int parts) { return n * part / parts; }

}  // namespace
