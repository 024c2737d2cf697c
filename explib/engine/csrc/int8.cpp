// Networks of int8; apart from the others, since who does not ask for it need not wait for it.
#include "network.h"

extern "C" {

// Channels in a word of a 1x1 conv
int explib_byte_point() { return POINT_CODES; }
// Channels of a chunk of a conv with outputs (height, width), whose kernels stand together: of
// blocks, or of single images
int explib_byte_chunk(int kernel, int stride, int height, int width, int channels, int together,
                      int flat) {
    return (flat ? image_chunk : byte_chunk)(kernel, stride, height, width, channels, together);
}
// Filters whose kernels stand together of a 1x1 conv of which most words are kept
int explib_byte_filters() { return POINT_FILTERS; }
// Kernels that stand together of a 3x3 conv of planes of 2 x 2, in single images; 0: as any other
int explib_byte_tiny(int channels) {
    return channels * 4 * int(sizeof(int32_t)) <= WORDS_BYTES ? TINY_KERNELS : 0;
}

void* explib_new(const Op* ops, int n_ops, const Tensor* tensors, int n_tensors, const Slot* slots,
                 int n_slots, int halo, int threads, int) {
    return planned<Byte>(ops, n_ops, tensors, n_tensors, slots, n_slots, halo, threads);
}
}
