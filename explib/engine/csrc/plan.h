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
struct Code {  // int8: a value is scale * (code - zero)
    float scale, zero;
};
struct Axis {  // a window along rows or columns
    int32_t kernel, stride, pad, dilation;
};
struct Op {
    // tensors; -1: none. LOAD, STORE, LINEAR: `other` is an argument, a LINEAR's that of its result
    int32_t kind, in, other, out;
    Axis rows, columns;
    int32_t act, groups;
    int32_t together;  // int8, 1x1: filters whose kernels stand together, so that one word serves all
    int32_t chunk;     // 1x1, not int8; in taps.h: channels whose kernels stand together
    int32_t passes;    // lists by channel of each thread, whose sums are near at once
    float alpha, beta;  // of the activation, SCALAR and norms (eps); SELECT: alpha is outside
    // CONV, LINEAR, AFFINE, norms: (F,). AVGPOOL, BILINEAR: scales or fractions of `index`
    const float *bias, *slope;  // slope: of PRELU, (F,)
    // CONV: kernels by filter, each KH * KW words; LINEAR: scalars (F, C); AFFINE, norms: floats
    const void* weight;
    const int32_t* start;  // (F + 1,) where the kernels of the filter at this place start
    // CONV: the channel of each kernel, of a plain 1x1 one in its chunk, as bytes. SELECT: of each
    // channel, row and column of the output the input's, or -1. Pools: first and end of the window
    // of each row, then of each column. BILINEAR: the first of two rows, then of two columns
    const int32_t* index;
    const int32_t* order;  // CONV: the filter at each place; null: as they are numbered
    // the same kernels as 36 floats at Winograd's points (winograd.h), of blocks of images and of single
    // ones, null where these are not computed so: (6, kernels, 6) where the nearest cache holds whole
    // rows of points, else (36, kernels); of single ones of four tiles (3, kernels, 6, 2)
    const void *winograd, *winograd_alone;
    const void* winograd_columns;  // of blocks at its points along columns (2, kernels, 3, 3), or null
    // bfloat16 only: the same kernels, two of a filter at once, (F + 1,) and two channels for each
    const void* pair_weight;
    const int32_t *pair_start, *pair_index;
    // the same kernels for planes of single images: by thread, whose filters are `share`, in `passes`
    // parts and each by channel, (threads * passes * C + 1,), with the filter of each; or by `chunk`
    // (taps.h) and place, (chunks * F + 1,), with the channel in that
    const void* plane_weight;
    const int32_t *plane_start, *plane_index, *plane_order;
    const int32_t* share;             // (threads + 1,)
    // int8 only: the same kernels as bytes (bytes.h), null where they are computed with as floats:
    // in chunks for blocks, in others for single images. The factor and the bias of each filter's
    // sums, (F,), and the codes of `in`, `other` and `out`
    const void* byte_weight;
    const int32_t *byte_start, *byte_index;
    const void* flat_weight;
    const int32_t *flat_start, *flat_index;
    const int32_t* byte_channel;  // 1x1: the channel of each code of the words of a pixel
    const float *byte_scale, *byte_bias;
    const float* flat_bias;  // of planes of 2 x 2 (byte_tiny.h) the bias of each output, (F, 4), or null
    Code in_code, other_code, out_code;
};
}

namespace {

// clang-format off
enum Kind { LOAD, STORE, CONV, LINEAR, MAXPOOL, AVGPOOL, ADD, SUB, MUL, DIV, MAXIMUM, AFFINE, SCALAR,
            ACT, COPY, LAYERNORM, GROUPNORM, SELECT, BILINEAR, FLATTEN };
enum Activation { NONE, RELU, CLAMP, SILU, HARDSWISH, HARDSIGMOID, SIGMOID, GELU, GELU_TANH, LEAKY,
                  PRELU, ELU, TANH, MISH };
// clang-format on

struct Plan {
    std::vector<Op> ops;
    std::vector<Tensor> tensors;
    std::vector<Slot> slots;
    int halo;  // how far convs look beyond a plane, in pixels
    int threads;
};

// Whether a conv has a filter of one channel for each output: weights by filter, no sums of channels
inline bool is_depthwise(const Op& op, const Tensor& in) {
    return op.groups > 1 && op.groups == in.channels;
}

// Whether a conv is square, of size 1 or 3, padded by half of it, undilated, of one stride
inline bool is_plain(const Op& op, const Tensor& in, const Tensor& out) {
    const auto same = [&](const Axis& axis, int size, int made) {
        return axis.pad == axis.kernel / 2 && axis.dilation == 1 &&
               made == (size - 1) / axis.stride + 1;
    };
    return (op.rows.kernel == 1 || op.rows.kernel == 3) && op.rows.kernel == op.columns.kernel &&
           op.rows.stride == op.columns.stride && same(op.rows, in.height, out.height) &&
           same(op.columns, in.width, out.width) && !is_depthwise(op, in);
}

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }
inline int64_t split(int64_t n, int part, int parts) { return n * part / parts; }

}  // namespace
