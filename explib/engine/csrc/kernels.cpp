// Networks of floats, and where the processor multiplies them of _Float16 or bfloat16.
#include "network.h"

extern "C" {

int explib_vector_bytes() { return VECTOR_BYTES; }
// Channels of a chunk of a 1x1 conv, whose planes have so many vectors: in `weight`, in `pair_weight`
int explib_chunk(int vectors) { return point_chunk_channels(vectors); }
int explib_pair_chunk(int chunk) { return chunk_of<Brain>(chunk); }
// Filters at once of a conv with more, or a multiple
int explib_at_once() { return AT_ONCE; }
// Scalars of an image's largest value in fp32, beyond which images go one by one
int explib_largest() { return LARGEST_BLOCK / VECTOR_BYTES; }
// Of a conv by channel the filters whose sums the nearest cache holds
int explib_sums_near() { return sums_near(); }
int explib_winograd_by_columns() { return BY_COLUMNS; }
int explib_winograd_four(int height, int width) { return winograd_four(height, width); }
int explib_winograd_whole_rows(int channels) { return winograd_whole_rows(channels); }
int explib_computes(int type) {
    return type == FLOAT32 || type == INT8 || (type == FLOAT16 && HALF) ||
           (type == BFLOAT16 && BRAIN);
}

void* explib_new(const Op* ops, int n_ops, const Tensor* tensors, int n_tensors, const Slot* slots,
                 int n_slots, int halo, int threads, int type) {
    const auto made = [&](auto zero) -> void* {
        using T = decltype(zero);
        return planned<T>(ops, n_ops, tensors, n_tensors, slots, n_slots, halo, threads);
    };
#if HALF
    if (type == FLOAT16) return made(_Float16{});
#endif
#if BRAIN
    if (type == BFLOAT16) return made(Brain{});
#endif
    return type == FLOAT32 ? made(float{}) : nullptr;
}
}
