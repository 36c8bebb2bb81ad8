// How raw tokens come into shared memory: a ring of half stages, 16 tokens of keys or of values each, every one a group
// of asynchronous copies. A token's heads lie side by side, each padded to 16 dims; scales of bytes lie behind.
#pragma once

#include "absorb.h"
#include "decode_softmax.cuh"
#include "storage.cuh"

namespace c2c {

// 16-byte chunk of a token in shared memory: see Layout::chunk_at of decode.cuh, whose fragments these are.
template <bool BYTES>
__device__ __forceinline__ int raw_chunk_at(int token, int chunk, bool value) {
  return BYTES ? chunk ^ (((value ? token >> 1 : token) & 3) << 1) : swizzled(token, chunk);
}

// Copies half stages of one side of a run. A thread always takes the same 16-byte chunk of tokens `step` apart.
template <bool BYTES>
struct RawFetcher {
  static constexpr int SIZE = BYTES ? 1 : 2;
  const char *data;  // head and chunk of this thread, token 0 of the batch row
  int64_t token_stride;
  int token, step, chunk;
  int within, dim;  // the chunk's number within its head; numbers in the head, 0 beyond all heads
  bool is_value;

  __device__ __forceinline__ RawFetcher(const AbsorbedSide &side, const Strided &stored, int batch, bool values)
      : token_stride(SIZE * stored.n), is_value(values) {
    const int chunks = side.width * SIZE / 16, of_head = side.padded * SIZE / 16;
    token = threadIdx.x / chunks;
    step = blockDim.x / chunks;
    chunk = threadIdx.x % chunks;
    const int head = chunk / of_head;
    within = chunk % of_head;
    dim = head < side.heads ? side.raw_dim : 0;
    data = static_cast<const char *>(stored.data) + SIZE * (batch * stored.b + (dim ? head : 0) * stored.h);
  }

  // Tokens first, first + 1, ... below `last`; zeros for the rest of the chunk.
  __device__ __forceinline__ void tokens(const Run &run, int batch, int pitch, int first, int last, char *slot) const {
    if (run.vectorised && !run.index.data) {
      const bool some = within * (16 / SIZE) < dim;
      const char *from = data + token_stride * (first + token) + within * 16;
#pragma unroll 4
      for (int at = token; at < CHUNK; at += step) {
        const bool inside = some && first + at < last;
        cp_async_16(shared_address(slot + at * pitch + raw_chunk_at<BYTES>(at, chunk, is_value) * 16),
                    inside ? from : data, inside);
        from += token_stride * step;
      }
      return;
    }
#pragma unroll 1
    for (int at = token; at < CHUNK; at += step) {
      const int stored = first + at < last ? stored_token(run, batch, first + at) : -1;
      const char *const from = data + token_stride * (stored < 0 ? 0 : stored);
      char *const to = slot + at * pitch + raw_chunk_at<BYTES>(at, chunk, is_value) * 16;
      if (run.vectorised)
        fetch_16_bytes<SIZE>(to, from, within, dim, stored >= 0);
      else
        fetch_numbers<SIZE>(to, from, within, dim, stored >= 0);
    }
  }

  // Scales of the same tokens, 16 of each head.
  __device__ __forceinline__ static void scales(const AbsorbedSide &side, const Run &run, int batch, int first,
                                                int last, float *to) {
    const Strided &scale = side.scale;
    if (side.scale_vectorised && !run.index.data) {
      for (int i = threadIdx.x; i < side.heads * 4; i += blockDim.x) {
        const int at = first + i % 4 * 4, count = max(0, min(4, last - at));
        const float *const from =
            static_cast<const float *>(scale.data) + batch * scale.b + i / 4 * scale.h + (count ? at : 0);
        cp_async_some(shared_address(to + i * 4), from, count * 4);
      }
      return;
    }
    for (int i = threadIdx.x; i < side.heads * CHUNK; i += blockDim.x) {
      const int at = first + i % CHUNK;
      to[i] = at < last ? scale_of(scale, side.scale_type, batch, i / CHUNK, stored_token(run, batch, at)) : 0.0f;
    }
  }
};

// The ring of a block.
template <bool BYTES>
struct Ring {
  const Absorbed &segment;
  const Work &work;
  RawFetcher<BYTES> keys, values;
  char *const slots;
  int taken, fetched, next_token;  // slots, the token of the next half stage
  bool next_is_value;

  __device__ __forceinline__ Ring(const Absorbed &s, const Work &w, char *shared)
      : segment(s),
        work(w),
        keys(s.key, w.run.key, w.batch, false),
        values(s.value, w.run.value, w.batch, true),
        slots(shared),
        taken(-1),
        fetched(0),
        next_token(w.first),
        next_is_value(false) {}

  __device__ __forceinline__ int pitch(bool value) const {
    return (value ? segment.value.width : segment.key.width) * RawFetcher<BYTES>::SIZE;
  }

  // Starts the next half stage, nothing behind the last one; a group in any case.
  __device__ __forceinline__ void fetch() {
    char *const slot = slots + fetched * segment.slot_bytes;
    if (next_token < work.last) {
      const AbsorbedSide &side = next_is_value ? segment.value : segment.key;
      if (next_is_value)
        values.tokens(work.run, work.batch, pitch(true), next_token, work.last, slot);
      else
        keys.tokens(work.run, work.batch, pitch(false), next_token, work.last, slot);
      if (BYTES && side.scale.data)
        RawFetcher<BYTES>::scales(side, work.run, work.batch, next_token, work.last, scales_of(slot, next_is_value));
    }
    cp_async_commit();
    next_token += next_is_value ? CHUNK : 0;
    next_is_value = !next_is_value;
    fetched = fetched + 1 == segment.slots ? 0 : fetched + 1;
  }

  __device__ __forceinline__ float *scales_of(char *slot, bool value) const {
    return reinterpret_cast<float *>(slot + CHUNK * pitch(value));
  }

  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int i = 1; i < segment.slots; ++i) fetch();
  }

  // The next half stage, arrived; the one before is given back to be filled. All threads call it.
  __device__ __forceinline__ char *take() {
    if (segment.slots == DEEP_RING)
      cp_async_wait<DEEP_RING - 2>();
    else
      cp_async_wait<SHALLOW_RING - 2>();
    __syncthreads();
    fetch();
    taken = taken + 1 == segment.slots ? 0 : taken + 1;
    return slots + taken * segment.slot_bytes;
  }
};

}  // namespace c2c
