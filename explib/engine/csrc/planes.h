// Convolutions of single images, [C][rows of W + halo]: a vector holds neighbouring pixels, and a
// shifted plane is a shifted load. Any kernel, stride and padding; depthwise.h has those of one
// channel a filter, winograd_images.h, tiny.h and pointwise_images.h what goes faster otherwise.
#pragma once
#include <algorithm>
#include <array>

#include "act.h"
#include "general.h"
#include "plan.h"
#include "taps.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int NEAR_BYTES = 512 * 1024;  // what the second cache holds for sure
// Filters whose sums stay in the first one
inline int sums_near() { return near_bytes() / (BESIDE * VECTOR_BYTES); }

// A conv of one image: its planes, with zeros between rows, before the first and behind the last one
template <class T>
struct ImageConv {
    const Op& op;
    const Tensor &source, &made;
    const T* in;
    const T* other;  // added to the outputs, or null
    T* out;
    int64_t in_plane, out_plane;
    int pitch, out_pitch;                 // of rows
    const typename Types<T>::V* inside;  // of an output's plane: zero between rows; int8: null
};

// NT taps of kernels by channel, of ALL or, if that is 0, of `taps`: the shifted planes stay in
// registers while all filters that use this channel take them; sums of N vectors of every filter,
// which are `at` there in a plane
template <class T, int ALL, int NT, int N>
[[gnu::noinline]] void add_taps(const Op& op, const T* in, const int64_t (&at)[N], int64_t plane,
                                int channels, const int* shift, int taps, int first_tap,
                                int first_list, int last_list, T* sums) {
    USE_TYPES;
    using Loose = typename Types<T>::Loose;
    const int32_t* words = (const int32_t*)op.plane_weight + first_tap;
    for (int list = first_list; list < last_list; ++list) {
        const int32_t* start = op.plane_start + int64_t(list) * channels;
        for (int c = 0; c < channels; ++c, ++start) {
            V pixels[NT][N];
            repeat<NT>([&](auto t) FORCED {
                repeat<N>([&](auto n) FORCED {
                    pixels[t][n] = *(const Loose*)(in + at[n] + c * plane + shift[first_tap + t]);
                });
            });
            for (int k = start[0]; k < start[1]; ++k) {
                V* sum = (V*)sums + int64_t(op.plane_index[k]) * N;
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
void conv_vectors(const Op& op, const T* in, const int64_t (&at)[N], int64_t plane, int channels,
                  const int* shift, int first_list, int last_list, int first, int last, T* sums) {
    USE_TYPES;
    const int taps = op.rows.kernel * op.columns.kernel;
    for (int f = first; f < last; ++f)
        repeat<N>([&](auto n) FORCED { ((V*)sums)[f * N + n] = splat<T>(T(op.bias[f])); });
    int done = 0;
    const auto pass = [&](auto nt) {
        for (; done + nt <= taps; done += nt)
            add_taps<T, 0, nt, N>(op, in, at, plane, channels, shift, taps, done, first_list,
                                  last_list, sums);
    };
    if (taps == 9)
        return add_taps<T, 9, 9, N>(op, in, at, plane, channels, shift, 9, 0, first_list, last_list,
                                    sums);
    if (taps % 7 == 0) pass(Int<7>{});
    if (taps % 5 == 0) pass(Int<5>{});
    pass(Int<9>{}), pass(Int<5>{}), pass(Int<3>{}), pass(Int<1>{});
}

// Where the sums of a conv's filters go
template <class T>
struct Results {
    const ImageConv<T>& conv;
    const Phases& phases;
    const typename Types<T>::V* mask;  // if the sums lie as the outputs do, which of them are inside
    bool far;  // no cache nearby holds all filters' planes, which are written in turns
    Results(const ImageConv<T>& conv, const Phases& phases)
        : conv(conv),
          phases(phases),
          mask(phases.pitch == conv.out_pitch ? conv.inside : nullptr),
          far(conv.made.channels * conv.out_plane * int64_t(sizeof(T)) > NEAR_BYTES) {}
};

// Sums of N vectors of filters f0 to f1 to their planes, row by row, where these lie otherwise
template <int N, class T>
[[gnu::noinline]] void finish_pieces(const Results<T>& to, const typename Types<T>::V* sums, int f0,
                                     int f1, int v) {
    USE_TYPES;
    const ImageConv<T>& a = to.conv;
    std::array<Piece, LANES> pieces[N];
    int count[N];
    repeat<N>([&](auto n) FORCED {
        count[n] = to.phases.pieces(a.made, a.out_pitch, (v + n) * LANES, LANES, pieces[n].data());
    });
    for (int f = f0; f < f1; ++f) {
        T* const out = a.out + f * a.out_plane;
        V values[N];
        repeat<N>([&](auto n) FORCED {
            values[n] = sums[(f - f0) * N + n];
            if (!a.other) return;
            alignas(64) T added[LANES] = {};
            for (int i = 0; i < count[n]; ++i)
                std::copy_n(a.other + f * a.out_plane + pieces[n][i].to, pieces[n][i].count,
                            added + pieces[n][i].from);
            values[n] += decoded<T>(load(added), a.op.other_code);
        });
        activate<N>(a.op, f, values);
        repeat<N>([&](auto n) FORCED {
            alignas(64) T made[LANES];
            if constexpr (std::is_same_v<T, Byte>) store(made, coded<T>(values[n], a.op.out_code));
            for (int i = 0; i < count[n]; ++i) {
                const Piece& piece = pieces[n][i];
                if constexpr (std::is_same_v<T, Byte>)
                    std::copy_n(made + piece.from, piece.count, out + piece.to);
                else
                    store_lanes(out + piece.to - piece.from, values[n], piece.from, piece.count);
            }
            if (count[n]) __builtin_prefetch(out + pieces[n][0].to + N * LANES, 1);
        });
    }
}

// Sums of N vectors of filters f0 to f1 to their planes, from vector v on
template <int N, class T>
FORCED inline void finish(const Results<T>& to, const typename Types<T>::V* sums, int f0, int f1,
                          int v) {
    USE_TYPES;
    if (!to.mask) return finish_pieces<N>(to, sums, f0, f1, v);
    const ImageConv<T>& a = to.conv;
    for (int f = f0; f < f1; ++f) {
        const int64_t at = f * a.out_plane + v * LANES;
        V values[N];
        if (to.far)
            repeat<N>([&](auto n) FORCED {
                __builtin_prefetch(a.out + at + (N + n) * LANES, 1);
            });
        repeat<N>([&](auto n) FORCED { values[n] = sums[(f - f0) * N + n]; });
        if (a.other)
            repeat<N>([&](auto n) FORCED { values[n] += load(a.other + at + n * LANES); });
        activate<N>(a.op, f, values);
        repeat<N>([&](auto n) FORCED {
            store(a.out + at + n * LANES, to.mask[v + n] == V{} ? V{} : values[n]);
        });
    }
}

// Sums of N vectors of filters f0 to f1 to whole vectors `at` there in their planes
template <int N, class T>
[[gnu::noinline]] void finish_whole(const Results<T>& to, const typename Types<T>::V* sums, int f0,
                                    int f1, const int64_t (&at)[N]) {
    USE_TYPES;
    const ImageConv<T>& a = to.conv;
    for (int f = f0; f < f1; ++f) {
        const int64_t plane = f * a.out_plane;
        V values[N];
        repeat<N>([&](auto n) FORCED {
            __builtin_prefetch(a.out + plane + at[n] + N * LANES, 1);
            values[n] = sums[(f - f0) * N + n];
            if (a.other) values[n] += decoded<T>(load_loose(a.other + plane + at[n]), a.op.other_code);
        });
        activate<N>(a.op, f, values);
        repeat<N>([&](auto n) FORCED {
            store_loose(a.out + plane + at[n], coded<T>(values[n], a.op.out_code));
        });
    }
}

// Vectors whose sums are made at once, and the scalars of them and of a tile that a thread needs
constexpr int MADE_AT_ONCE = PACKS_TAPS ? TAP_VECTORS : BESIDE;
template <class T>
int64_t planes_sums(const Tensor& out) {
    return int64_t(out.channels) * MADE_AT_ONCE * Types<T>::lanes;
}
template <class T>
int64_t planes_own(const Tensor& out, const Phases& phases) {
    return planes_sums<T>(out) + (PACKS_TAPS ? taps_tile<T>(int(phases.shift.size())) : 0);
}

// Scratch that `threads` threads need for a conv of any kind but depthwise, in scalars
template <class T>
int64_t planes_scratch(const Tensor& in, const Tensor& out, const Phases& phases, int threads) {
    return planes_own<T>(out, phases) * threads +
           (phases.in_place ? 0 : in.channels * phases.count * phases.plane);
}

// From the input where its halo is wide enough, else from phases of it. Threads share the plane
// where it is large, else the filters
template <class T>
void conv_planes(const ImageConv<T>& a, const Phases& phases, typename Types<T>::Scalar* scratch,
                 int threads, int part, int parts, Barrier& barrier) {
    USE_TYPES;
    using Scalar = typename Types<T>::Scalar;
    const int64_t own = planes_own<Scalar>(a.made, phases);
    const int filters = a.made.channels, channels = a.source.channels;
    const Scalar* x = (const Scalar*)a.in;
    int64_t plane = a.in_plane;
    if (!phases.in_place) {
        Scalar* planes = scratch + threads * own;
        plane = phases.count * phases.plane;
        const int last = (int)split(channels, part + 1, parts);
        for (int c = (int)split(channels, part, parts); c < last; ++c)
            split_phases(a.op, phases, a.source, a.in + c * a.in_plane, a.pitch, planes + c * plane);
        barrier.wait(parts);
        x = planes + phases.origin;
    }
    Scalar *sums = scratch + part * own, *tile = sums + planes_sums<Scalar>(a.made);
    const Results<T> to(a, phases);
    // rows of whole vectors are taken one by one where the outputs' planes have another pitch
    const int across = !to.mask && a.made.width % LANES == 0 ? a.made.width / LANES : 0;
    const int count = across ? a.made.height * across : phases.vectors;
    const bool by_plane = count >= 8 * parts, all = by_plane || parts == 1;
    const int f0 = all ? 0 : a.op.share[part], f1 = all ? filters : a.op.share[part + 1];
    const int first = all ? 0 : part * a.op.passes;
    const int last = all ? threads * a.op.passes : first + a.op.passes;
    const auto vectors = [&](auto n, int v) {
        int64_t from[n], at[n];
        repeat<n>([&](auto i) FORCED {
            const int row = across ? (v + i) / across : 0, q = v + i - row * across;
            from[i] = int64_t(row) * phases.pitch + q * LANES;
            at[i] = int64_t(row) * a.out_pitch + q * LANES;
        });
        if constexpr (PACKS_TAPS)
            packed_vectors<Scalar, n>(a.op, x, from, plane, channels, phases.shift.data(), filters,
                                      f0, f1, tile, sums);
        else
            conv_vectors<Scalar, n>(a.op, x, from, plane, channels, phases.shift.data(), first, last,
                                    f0, f1, sums);
        if (across) return finish_whole<n>(to, (const V*)sums + f0 * n, f0, f1, at);
        finish<n>(to, (const V*)sums + f0 * n, f0, f1, v);
    };
    const int end = by_plane ? (int)split(count, part + 1, parts) : count;
    int v = by_plane ? (int)split(count, part, parts) : 0;
    if constexpr (PACKS_TAPS) {
        for (int left = (end - v + TAP_VECTORS - 1) / TAP_VECTORS; left; --left) {
            const int size = (end - v) / left;
            repeat<TAP_VECTORS>([&](auto n) {
                if (size == n + 1) vectors(Int<n + 1>{}, v);
            });
            v += size;
        }
    } else {
        for (; end - v >= 5 || end - v == 3; v += 3) vectors(Int<3>{}, v);
        for (; end - v >= 2; v += 2) vectors(Int<2>{}, v);
        if (v < end) vectors(Int<1>{}, v);
    }
}

}  // namespace
