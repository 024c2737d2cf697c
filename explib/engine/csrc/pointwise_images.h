// 1x1 convolutions of single images. One with a stride takes its pixels side by side first, once for
// all its filters.
#pragma once
#include <algorithm>
#include <cstring>

#include "planes.h"
#include "pointwise.h"
#include "threads.h"
#include "vectors.h"

namespace {

// Values of memory for what a 1x1 conv with a stride takes; 0 of any other conv
inline int64_t taken(const Op& op, const Tensor& in, int64_t out_plane) {
    return op.rows.kernel == 1 && op.rows.stride > 1 ? in.channels * out_plane : 0;
}

// Every `stride`th pixel of every such row of a plane, as many as the output has. What is written
// between the rows no result depends on
template <class T>
void take_plane(int stride, const Tensor& made, const T* in, int pitch, T* out, int out_pitch) {
    for (int r = 0; r < made.height; ++r, in += stride * pitch, out += out_pitch) {
        int q = 0;
        if constexpr (!std::is_same_v<T, Byte>) {
            USE_TYPES;
            for (; stride == 2 && q < made.width; q += LANES) {
                const V one = load_loose(in + 2 * q), two = load_loose(in + 2 * q + LANES);
                store_lanes(out + q, picked<2, 0>(one, two), 0, std::min(LANES, made.width - q));
            }
        }
        for (; q < made.width; ++q) out[q] = in[q * stride];
    }
}

// What the conv takes of its input, to memory of `taken` values, whence it reads from now on
template <class T>
void take_pixels(ImageConv<T>& a, T* to, int part, int parts, Barrier& barrier) {
    if (!taken(a.op, a.source, a.out_plane)) return;
    const int last = (int)split(a.source.channels, part + 1, parts);
    for (int c = (int)split(a.source.channels, part, parts); c < last; ++c)
        take_plane(a.op.rows.stride, a.made, a.in + c * a.in_plane, a.pitch, to + c * a.out_plane,
                   a.out_pitch);
    barrier.wait(parts);
    a.in = to, a.in_plane = a.out_plane;
}

// Threads share the plane, of so many vectors, where it is large, else the filters
template <class T>
void pointwise_image(const ImageConv<T>& a, int vectors, const PointScratch& scratch, int part,
                     int parts) {
    constexpr int LANES = Types<T>::lanes;
    const Op& op = a.op;
    const T* in = a.in;
    const int64_t from = a.in_plane;
    Points<T> conv = {.in = in, .other = a.other, .out = a.out, .out_plane = a.out_plane,
                      .channels = a.source.channels, .filters = a.made.channels, .first = 0,
                      .last = a.made.channels, .op = &op, .weight = (const int32_t*)op.weight,
                      .start = op.start, .order = op.order, .index = (const uint8_t*)op.index,
                      .inside = a.inside};
    conv.use(scratch);
    if (parts > 1 && vectors < 10 * parts) {
        conv.first = op.share[part], conv.last = op.share[part + 1];
        part = 0, parts = 1;
    }
    points(conv, (int)split(vectors, part, parts), (int)split(vectors, part + 1, parts),
           [&](int first, int count) {
               return [=](int channel, int n, T* tile) {
                   const T* x = in + channel * from + first * LANES;
                   for (int c = 0; c < n; ++c, x += from, tile += count * LANES)
                       std::memcpy(tile, x, count * LANES * sizeof(T));
               };
           });
}

}  // namespace
