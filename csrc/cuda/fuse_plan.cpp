#include "fuse_plan.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <initializer_list>

#include "arguments.h"
#include "launch.h"

namespace c2c {

namespace {

constexpr int64_t MOST = INT32_MAX - 1024;              // tokens, widths and tiles are counted in 32 bits
constexpr int64_t SCRATCH = 60 * int64_t{1024 * 1024};  // bytes, at most, where a job does not need more
constexpr int64_t FILLS = 96;                           // programs that keep a GPU busy; the smallest meant has 108 SMs
constexpr int ALIGNMENT = 256;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t sharer_width(const c2c_fuse_half &h) { return h.sharer_heads * h.sharer_dim; }
int64_t receiver_width(const c2c_fuse_half &h) { return h.kv_heads * h.dim; }
int blocks_of(const c2c_fuse_half &h) { return 2 + h.project_count; }

int64_t largest_inner(const c2c_fuse_half &h) {
  int64_t largest = 0;
  for (int i = 0; i < blocks_of(h); ++i) largest = std::max(largest, h.blocks[i].inner);
  return largest;
}

c2c_status_code check(const c2c_fuse_half &h) {
  for (int64_t n : {h.batch, h.len, h.sharer_len})
    if (n < 0 || n > MOST) return C2C_BAD_SHAPE;
  for (int64_t n : {h.kv_heads, h.dim, h.sharer_heads, h.sharer_dim, h.hidden, int64_t{h.project_count}})
    if (n <= 0 || n > MOST) return C2C_BAD_SHAPE;
  if (!h.index.data && h.len > h.sharer_len) return C2C_BAD_SHAPE;
  if (blocks_of(h) > MAX_FUSE_BLOCKS) return C2C_UNSUPPORTED;
  if (h.batch * h.len > MOST || sharer_width(h) + receiver_width(h) > MOST) return C2C_UNSUPPORTED;
  const int32_t type = h.receiver.dtype;
  if (!is_half(type)) return C2C_BAD_DTYPE;
  for (const c2c_tensor *t : {&h.sharer, &h.residual, &h.out, &h.in_weight, &h.in_bias, &h.out_weight, &h.out_bias,
                              &h.scale_weight, &h.scale_bias, &h.gate_logit})
    if (t->dtype != type) return C2C_BAD_DTYPE;
  for (int i = 0; i < blocks_of(h); ++i) {
    const c2c_fuse_block &block = h.blocks[i];
    if (block.inner <= 0 || block.inner > MOST) return C2C_BAD_SHAPE;
    if (block.norm.dtype != type || block.w1.dtype != type || block.w2.dtype != type) return C2C_BAD_DTYPE;
  }
  if (h.index.data && !is_integer(h.index.dtype)) return C2C_BAD_DTYPE;
  return h.gate.data && !is_float(h.gate.dtype) ? C2C_BAD_DTYPE : C2C_OK;
}

bool rows_vectorised(const c2c_tensor &matrix, int64_t width) {
  return (reinterpret_cast<int64_t>(matrix.data) | 2 * (matrix.stride[0] | width)) % 16 == 0;
}

bool weights_vectorised(const c2c_fuse_half &h) {
  const int64_t hidden = h.hidden;
  bool all = rows_vectorised(h.in_weight, sharer_width(h) + receiver_width(h)) &&
             rows_vectorised(h.out_weight, hidden) && rows_vectorised(h.scale_weight, hidden);
  for (const c2c_tensor *t : {&h.in_bias, &h.out_bias}) all = all && reinterpret_cast<int64_t>(t->data) % 16 == 0;
  for (int i = 0; i < blocks_of(h); ++i) {
    const c2c_fuse_block &block = h.blocks[i];
    all = all && rows_vectorised(block.w1, hidden) && rows_vectorised(block.w2, block.inner) &&
          reinterpret_cast<int64_t>(block.norm.data) % 16 == 0;
  }
  return all;
}

bool caches_vectorised(const c2c_fuse_half &h) {
  return vectorised(h.receiver, h.dim) && vectorised(h.sharer, h.sharer_dim) && vectorised(h.residual, h.dim) &&
         vectorised(h.out, h.dim);
}

bool alike(const c2c_fuse_half &a, const c2c_fuse_half &b) {
  bool same = a.batch == b.batch && a.len == b.len && a.kv_heads == b.kv_heads && a.dim == b.dim &&
              a.sharer_heads == b.sharer_heads && a.sharer_dim == b.sharer_dim && a.hidden == b.hidden &&
              a.project_count == b.project_count && a.receiver.dtype == b.receiver.dtype &&
              !a.gate.data == !b.gate.data;
  for (int i = 0; same && i < blocks_of(a); ++i) same = a.blocks[i].inner == b.blocks[i].inner;
  return same;
}

// The products of one half in an order in which each comes behind what it needs; those of a stage wait for all of the
// stage before.
void lay_steps(const c2c_fuse_half &h, int64_t columns, Fuse &out) {
  int32_t wait = 0, total = 0;
  const auto add = [&](FuseKind kind, int block, int64_t size, int64_t width) {
    const int32_t tiles = static_cast<int32_t>(divided(size, columns));
    out.step[out.steps++] = {total, kind, block, static_cast<int32_t>(size), static_cast<int32_t>(width), tiles, wait};
    total += tiles;
  };
  const auto inner = [&](int block) { add(FUSE_INNER, block, h.blocks[block].inner, h.hidden); };
  const auto outer = [&](int block) { add(FUSE_OUTER, block, h.hidden, h.blocks[block].inner); };
  const auto end_stage = [&] { wait = total; };
  out.steps = 0;
  add(FUSE_ENTER, 0, h.hidden, sharer_width(h) + receiver_width(h));
  end_stage();
  inner(FUSE_EMBED);
  end_stage();
  outer(FUSE_EMBED);
  end_stage();
  inner(FUSE_SCALE);
  inner(FUSE_PROJECT);
  end_stage();
  outer(FUSE_SCALE);
  outer(FUSE_PROJECT);
  end_stage();
  for (int block = FUSE_PROJECT + 1; block < blocks_of(h); ++block) {
    inner(block);
    end_stage();
    outer(block);
    end_stage();
  }
  add(FUSE_LEAVE, 0, receiver_width(h), h.hidden);
}

int64_t tiles_of_half(const c2c_fuse_half &h, int64_t columns) {
  int64_t tiles = divided(h.hidden, columns) * (1 + blocks_of(h)) + divided(receiver_width(h), columns);
  for (int i = 0; i < blocks_of(h); ++i) tiles += divided(h.blocks[i].inner, columns);
  return tiles;
}

int64_t bytes_of_job(const c2c_fuse_half &h, const FuseKernel &kernel) {
  return kernel.rows * (4 * (round_up(h.hidden, 8) + round_up(largest_inner(h), 8)) +
                        4 * divided(h.hidden, kernel.columns) * (1 + h.kv_heads));
}

FuseHalf half_of(const c2c_fuse_half &h) {
  FuseHalf out{};
  const auto matrix = [](const c2c_tensor &t) { return FuseMatrix{t.data, t.stride[0]}; };
  out.receiver = strided(h.receiver, 0, 1, 2);
  out.sharer = strided(h.sharer, 0, 1, 2);
  out.residual = strided(h.residual, 0, 1, 2);
  out.out = strided(h.out, 0, 1, 2);
  out.index = strided(h.index, 0, -1, 1);
  out.gate = strided(h.gate, 0, 1, 2);
  out.in_weight = matrix(h.in_weight);
  out.out_weight = matrix(h.out_weight);
  out.scale_weight = matrix(h.scale_weight);
  out.in_bias = h.in_bias.data;
  out.out_bias = h.out_bias.data;
  out.scale_bias = h.scale_bias.data;
  out.gate_logit = h.gate_logit.data;
  out.stored = static_cast<int32_t>(h.sharer_len);
  out.index_type = static_cast<int8_t>(h.index.dtype);
  out.gate_type = static_cast<int8_t>(h.gate.dtype);
  for (int i = 0; i < blocks_of(h); ++i)
    out.blocks[i] = {h.blocks[i].norm.data, matrix(h.blocks[i].w1), matrix(h.blocks[i].w2)};
  return out;
}

}  // namespace

c2c_status_code fuse_groups(const c2c_fuse_params &p, std::vector<FuseGroup> &groups) {
  for (int32_t i = 0; i < p.half_count; ++i) {
    const c2c_fuse_half &h = p.halves[i];
    if (c2c_status_code code = check(h)) return code;
    if (h.batch * h.len == 0) continue;
    const bool weights = weights_vectorised(h), caches = caches_vectorised(h);
    const auto found = std::find_if(groups.begin(), groups.end(), [&](const FuseGroup &group) {
      return group.weights_vectorised == weights && group.caches_vectorised == caches && alike(*group.like, h);
    });
    if (found == groups.end())
      groups.push_back({&h, {&h}, weights, caches});
    else
      found->halves.push_back(&h);
  }
  return C2C_OK;
}

FuseKernel fuse_kernel_of(const FuseGroup &group, int capability) {
  const c2c_fuse_half &h = *group.like;
  const bool bf16 = h.receiver.dtype == C2C_BF16;
  const auto kernel = [&](FuseShape shape) { return bf16 ? fuse_kernel_bf16(shape) : fuse_kernel_f16(shape); };
  // Tokens are read once per tile of columns: as wide a tile as leaves enough programs.
  const int64_t rows = h.batch * h.len, halves = static_cast<int64_t>(group.halves.size());
  const auto fills = [&](int64_t columns) {
    return h.hidden >= columns && halves * divided(rows, 64) * divided(h.hidden, columns) >= FILLS;
  };
  if (rows <= 16) return kernel(rows > 4 || fills(128) ? FUSE_16x128 : FUSE_16x32);
  if (has_large_blocks(capability) && fills(512)) return bf16 ? large_fuse_kernel_bf16() : large_fuse_kernel_f16();
  return kernel(fills(256) ? FUSE_64x256 : FUSE_64x128);
}

std::vector<FusePart> fuse_parts(const FuseGroup &group, const FuseKernel &kernel) {
  const c2c_fuse_half &h = *group.like;
  const int32_t halves = static_cast<int32_t>(group.halves.size());
  const int64_t row_tiles = divided(h.batch * h.len, kernel.rows);
  const int64_t most = std::max<int64_t>(1, SCRATCH / bytes_of_job(h, kernel));
  const int32_t of_part = static_cast<int32_t>(std::min<int64_t>(halves, std::max<int64_t>(1, most / row_tiles)));
  std::vector<FusePart> parts;
  for (int32_t half = 0; half < halves; half += of_part)
    for (int64_t tile = 0; tile < row_tiles; tile += most)
      parts.push_back({&group, half, std::min(of_part, halves - half), static_cast<int32_t>(tile),
                       static_cast<int32_t>(std::min(most, row_tiles - tile))});
  return parts;
}

int32_t fuse_table_words(const FuseGroup &group) {
  return static_cast<int32_t>((offsetof(FuseHalf, blocks) + blocks_of(*group.like) * sizeof(FuseBlock)) / 8);
}

std::vector<int64_t> fuse_table(const FusePart &part) {
  const int32_t words = fuse_table_words(*part.group);
  std::vector<int64_t> table(static_cast<size_t>(part.halves) * words);
  for (int32_t i = 0; i < part.halves; ++i) {
    const FuseHalf half = half_of(*part.group->halves[part.first_half + i]);
    std::memcpy(&table[static_cast<size_t>(i) * words], &half, words * sizeof(int64_t));
  }
  return table;
}

FuseSpace fuse_space(const FusePart &part, const FuseKernel &kernel) {
  const c2c_fuse_half &h = *part.group->like;
  const int64_t jobs = int64_t{part.halves} * part.row_tiles, rows = jobs * kernel.rows;
  const int64_t tiles = divided(h.hidden, kernel.columns);
  FuseSpace space{};
  const auto take = [&](int64_t bytes) {
    const int64_t at = space.size;
    space.size += round_up(bytes, ALIGNMENT);
    return at;
  };
  space.table = take(int64_t{8} * part.halves * fuse_table_words(*part.group));
  space.states = take(part.halves);
  space.counters = take(4 * (1 + jobs));
  space.h = take(2 * rows * round_up(h.hidden, 8));
  space.projected = take(2 * rows * round_up(h.hidden, 8));
  space.inner = take(2 * rows * round_up(largest_inner(h), 8));
  space.scale_inner = take(2 * rows * round_up(largest_inner(h), 8));
  space.squares = take(4 * rows * tiles);
  space.logits = take(4 * rows * tiles * h.kv_heads);
  return space;
}

c2c_status_code fuse_arguments(const FusePart &part, const FuseKernel &kernel, char *workspace, Fuse &out) {
  const c2c_fuse_half &h = *part.group->like;
  const FuseSpace space = fuse_space(part, kernel);
  const auto at = [&](int64_t offset) { return static_cast<void *>(workspace + offset); };
  const int64_t jobs = int64_t{part.halves} * part.row_tiles;
  if (jobs * tiles_of_half(h, kernel.columns) > MOST) return C2C_UNSUPPORTED;
  out = {};
  lay_steps(h, kernel.columns, out);
  out.table = at(space.table);
  out.table_row = 8 * fuse_table_words(*part.group);
  out.states = static_cast<const int8_t *>(at(space.states));
  out.counters = static_cast<int32_t *>(at(space.counters));
  out.h = at(space.h);
  out.projected = at(space.projected);
  out.inner = at(space.inner);
  out.scale_inner = at(space.scale_inner);
  out.squares = static_cast<float *>(at(space.squares));
  out.logits = static_cast<float *>(at(space.logits));
  out.hidden_pitch = static_cast<int32_t>(round_up(h.hidden, 8));
  out.inner_pitch = static_cast<int32_t>(round_up(largest_inner(h), 8));
  out.sum_tiles = static_cast<int32_t>(divided(h.hidden, kernel.columns));
  out.jobs = static_cast<int32_t>(jobs);
  out.row_tiles = part.row_tiles;
  out.first_tile = part.first_tile;
  out.batch = static_cast<int32_t>(h.batch);
  out.len = static_cast<int32_t>(h.len);
  out.kv_heads = static_cast<int32_t>(h.kv_heads);
  out.dim = static_cast<int32_t>(h.dim);
  out.sharer_heads = static_cast<int32_t>(h.sharer_heads);
  out.sharer_dim = static_cast<int32_t>(h.sharer_dim);
  out.hidden = static_cast<int32_t>(h.hidden);
  out.blocks = blocks_of(h);
  out.weights_vectorised = part.group->weights_vectorised;
  out.caches_vectorised = part.group->caches_vectorised;
  out.gated = h.gate.data != nullptr;
  return C2C_OK;
}

}  // namespace c2c
