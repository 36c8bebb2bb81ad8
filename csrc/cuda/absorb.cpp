// Decode beside absorbed segments: what its two launches are told. How tokens are split depends on nothing but the
// shape of a row's tokens.
#include "absorb.h"

#include <algorithm>
#include <atomic>
#include <random>

#include "arguments.h"
#include "kernels.h"

namespace c2c {

namespace {

int64_t all_rows(const Attention &p) { return static_cast<int64_t>(p.q_heads) * p.q_len; }

// Tokens of a split of raw tokens, of numbers of `size` bytes: a power of two, so many that what a split reads of
// queries and leaves of sums, 6 bytes x rows x width, is below 5% of its tokens.
int32_t raw_split_tokens(int64_t rows, int size) {
  int64_t tokens = 128;
  while (tokens < 64 * std::min<int64_t>(rows, ABSORB_ROWS) / size) tokens *= 2;
  return static_cast<int32_t>(tokens);
}

void plan_ring(const Run &run, Absorbed &s) {
  const int size = size_of(run.key_type), width = std::max(s.key.width, s.value.width);
  const bool scaled = s.key.scale.data || s.value.scale.data;
  const int scales = scaled ? std::max(s.key.heads, s.value.heads) * CHUNK_TOKENS * 4 : 0;
  s.slot_bytes = (CHUNK_TOKENS * width * size + scales + 127) / 128 * 128;
  s.slots = s.slot_bytes > 12 * 1024 ? SHALLOW_RING : DEEP_RING;
}

// All but the pointers into the workspace.
void plan(AbsorbDecode &a) {
  Decode &d = a.decode;
  const Attention &p = d.attention;
  for (int i = 0; i < a.absorption.count; ++i) {
    const int number = a.absorption.segment[i].number;
    d.split_tokens[number] = raw_split_tokens(all_rows(p), size_of(p.run[number].key_type));
  }
  plan_decode(d);
  a.dim = 64;
  while (a.dim < std::max(p.head_dim, p.value_dim)) a.dim *= 2;
  a.direct_splits = d.splits;
  a.result_pitch = (p.value_dim + 7) / 8 * 8 + 8;
  a.row_tiles = static_cast<int32_t>((all_rows(p) + ABSORB_ROWS - 1) / ABSORB_ROWS);
  for (int i = 0; i < a.absorption.count; ++i) {
    Absorbed &s = a.absorption.segment[i];
    s.splits = d.first_split[s.number + 1] - d.first_split[s.number];
    s.pieces = s.splits ? p.kv_heads * (s.key.width / FOLD_COLUMNS) : 0;
    plan_ring(p.run[s.number], s);
    a.direct_splits -= s.splits;
    a.pieces += s.pieces;
    a.raw_blocks += s.splits * a.row_tiles;
  }
}

// Hands out a workspace in pieces that begin a sector.
struct Pieces {
  char *data;
  int64_t used = 0;
  template <typename T>
  void take(T *&to, int64_t bytes) {
    to = data ? reinterpret_cast<T *>(data + used) : nullptr;
    used += round_up(bytes, 32);
  }
};

// Bytes of workspace; pointers into it where there is one.
int64_t divide(AbsorbDecode &a, void *workspace) {
  Decode &d = a.decode;
  const Attention &p = d.attention;
  const int64_t rows = p.batch * all_rows(p);
  Pieces pieces{static_cast<char *>(workspace)};
  pieces.take(d.states, rows * d.splits * static_cast<int64_t>(sizeof(float2)));
  pieces.take(d.sums, rows * d.splits * p.value_dim * static_cast<int64_t>(sizeof(float)));
  for (int i = 0; i < a.absorption.count; ++i) {
    Absorbed &s = a.absorption.segment[i];
    if (!s.splits) continue;
    pieces.take(s.query, rows * s.key.width * 2);
    if (p.dtype == C2C_F16) pieces.take(s.fold_scales, rows * (s.key.width / FOLD_COLUMNS) * 4);
    pieces.take(s.shift, rows * 4);
    pieces.take(s.sums, rows * s.splits * s.value.width * 2);
    pieces.take(s.scales, rows * s.splits * ABSORB_WARPS * 4);
    pieces.take(s.marks, int64_t{p.batch} * s.pieces * 8);
  }
  return pieces.used;
}

// An even number that no earlier call's marks hold: see absorb_marks.cuh.
uint64_t number_of_call() {
  static const uint64_t seed = (static_cast<uint64_t>(std::random_device{}()) << 32) | std::random_device{}();
  static std::atomic<uint64_t> calls{0};
  uint64_t x = seed + ++calls * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return (x ^ x >> 31) & ~uint64_t{1};
}

uint32_t split_shared(const AbsorbDecode &a, int groups) {
  int bytes = decode_shared(a.dim);
  for (int i = 0; i < a.absorption.count; ++i) {
    const Absorbed &s = a.absorption.segment[i];
    bytes = std::max(bytes, s.slots * s.slot_bytes + groups * EXCHANGE_BYTES);
  }
  return static_cast<uint32_t>(bytes);
}

// As CombineShared has it.
uint32_t combine_shared(const AbsorbDecode &a) {
  const Attention &p = a.decode.attention;
  const int rows = p.q_len * p.group;
  int width = 0;
  for (int i = 0; i < a.absorption.count; ++i) width = std::max(width, a.absorption.segment[i].value.width);
  const int numbers = 2 * (rows + rows % 2) + (rows * MAX_RUNS + 3) / 4 * 4 + rows * a.result_pitch +
                      COMBINE_ROWS * (width + COMBINE_PITCH_PAD);
  return static_cast<uint32_t>(4 * numbers);
}

}  // namespace

int64_t absorb_workspace(const Attention &p, const Absorption &absorption) {
  AbsorbDecode a{};
  a.decode.attention = p;
  a.absorption = absorption;
  plan(a);
  return divide(a, nullptr);
}

c2c_status_code launch_absorb(const Attention &p, const Absorption &absorption, void *workspace, Executor run,
                              void *context) {
  AbsorbDecode a{};
  a.decode.attention = p;
  a.absorption = absorption;
  plan(a);
  divide(a, workspace);
  a.call = number_of_call();
  const int64_t blocks = int64_t{p.batch} * (a.pieces + a.raw_blocks) +
                         int64_t{p.batch} * p.kv_heads * a.decode.row_tiles * a.direct_splits;
  if (!p.batch || !all_rows(p)) return C2C_OK;
  if (blocks > INT32_MAX || p.batch * all_rows(p) > INT32_MAX) return C2C_UNSUPPORTED;
  const AbsorbKernels &kernels = p.dtype == C2C_BF16 ? absorb_bf16 : absorb_f16;
  const int groups = all_rows(p) > 16 ? 2 : 1;
  if (blocks) {
    const Launch split{kernels.split,
                       kernels.split_name,
                       static_cast<uint32_t>(blocks),
                       static_cast<uint32_t>(groups * ABSORB_WARPS * 32),
                       split_shared(a, groups),
                       &a,
                       sizeof a};
    if (c2c_status_code code = run(split, context)) return code;
  }
  const Launch merge{kernels.combine,
                     kernels.combine_name,
                     static_cast<uint32_t>(p.batch * p.kv_heads),
                     ABSORB_COMBINE_THREADS,
                     combine_shared(a),
                     &a,
                     sizeof a};
  return run(merge, context);
}

}  // namespace c2c
