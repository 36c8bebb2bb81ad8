// Projection by matrix tiles (matrix_tiles.h), tokens as rows. Included inside an instruction set's namespace.
//
// Weights are packed once per call, into memory that all threads share: its size does not depend on the tokens.

// Packed weights of one half, null where it is not projected by tiles: [kv_heads][out_dim / 16][depth / 32] tiles, and
// of a low-rank projector's inner side [rank / 16][width / 32].
struct TiledWeights {
  bf16 *proj = nullptr, *proj_in = nullptr;
};

#if defined(C2C_MATRIX_TILES)
constexpr int64_t STEP_TILES = PIECE / DEPTH;  // of the depth multiplied at a time: 16 KB of two columns' weights

static int64_t projected_depth(const Half &half) { return half.proj_in->data ? half.rank : half.width; }

// bfloat16 tokens as they are stored.
static bool stored_as_bf16(const c2c_project_params &p, const Half &half) {
  return half.raw->dtype == C2C_BF16 && !half.scale->data && !(half.key && p.remove_cos.data);
}

// Whether a half is projected by tiles into `out_dtype`: where weights are bfloat16 and tokens are, or may be rounded
// to it because PyTorch's own computation would round them and the result: de-quantised, un-rotated or in a low rank.
static bool in_tiles(const c2c_project_params &p, const Half &half, int32_t out_dtype) {
  const c2c_tensor &raw = *half.raw, &proj = *half.proj, &proj_in = *half.proj_in;
  if (!proj.data || proj.dtype != C2C_BF16 || (proj_in.data && proj_in.dtype != C2C_BF16)) return false;
  if (raw.dtype != C2C_BF16 && raw.dtype != C2C_I8 && raw.dtype != C2C_F8E4M3) return false;
  return out_dtype == C2C_BF16 || (stored_as_bf16(p, half) && !proj_in.data);
}
static bool in_tiles(const c2c_project_params &p, const Half &half) { return in_tiles(p, half, half.out->dtype); }

static int64_t head_weights(const Half &half) {
  return round_up(half.out_dim, SIDE) * round_up(projected_depth(half), DEPTH);
}
static int64_t inner_weights(const Half &half) {
  return half.proj_in->data ? round_up(half.rank, SIDE) * round_up(half.width, DEPTH) : 0;
}

static TiledWeights take_weights(Carver &carver, const c2c_project_params &p, const Half &half) {
  if (!in_tiles(p, half)) return {};
  TiledWeights weights;
  weights.proj = (bf16 *)carver.take(p.kv_heads * head_weights(half) / 2);
  weights.proj_in = (bf16 *)carver.take(inner_weights(half) / 2);
  return weights;
}

// Pieces of the work of packing a half's weights: 16 rows of a projector each.
static int64_t weight_units(const c2c_project_params &p, const Half &half) {
  if (!in_tiles(p, half)) return 0;
  return p.kv_heads * div_up(half.out_dim, SIDE) + (half.proj_in->data ? div_up(half.rank, SIDE) : 0);
}

static void pack_weights(const c2c_project_params &p, const Half &half, const TiledWeights &weights, int64_t unit) {
  const int64_t parts = div_up(half.out_dim, SIDE), head = unit / parts;
  const bool inner = head >= p.kv_heads;
  const c2c_tensor &from = inner ? *half.proj_in : *half.proj;
  const int64_t row = (inner ? unit - p.kv_heads * parts : unit % parts) * SIDE;
  const int64_t rows = least(SIDE, (inner ? half.rank : half.out_dim) - row);
  const int64_t depth = inner ? half.width : projected_depth(half), ld = from.stride[inner ? 0 : 1];
  bf16 *const to = inner ? weights.proj_in : weights.proj + head * head_weights(half);
  const bf16 *const first = (const bf16 *)(inner ? from.data : at(from, head)) + row * ld;
  pack_tile_columns(to + row * round_up(depth, DEPTH), first, ld, rows, depth);
}

// Tokens j .. j + n of a batch row as packed rows.
static void pack_raw(const c2c_project_params &p, const Half &half, int64_t b, int64_t j, int64_t n, bf16 *to,
                     ProjectScratch &x) {
  const c2c_segment &s = p.segment;
  const int64_t depth_tiles = div_up(half.width, DEPTH), ld = round_up(half.width, PANEL);
  const bool stored = stored_as_bf16(p, half);
  if (!stored) load_raw(p, half, b, j, n, x.raw, ld, x.tables);
  for (int64_t t = 0; t < n; ++t) {
    bf16 *const row = packed_row(to, t, depth_tiles);
    const int64_t token =
        s.index.data ? integer_at(s.index, b * s.index.stride[0] + (j + t) * s.index.stride[1]) : j + t;
    if (!stored) pack_row(row, 0, x.raw + t * ld, half.width);
    for (int64_t head = 0; stored && head < s.heads; ++head)
      pack_row(row, head * half.dim, (const bf16 *)at(*half.raw, b, head, token), half.dim);
    end_packed_row(row, half.width);
  }
  end_packed_rows(to, n, depth_tiles);
}

// x.products[tokens][ld] = tokens, packed, times `columns` packed columns of weights: a sum of sums over pieces of the
// depth, as in multiply(). With AMX only where `exact`: by a pass of its own, for tile registers go on from a sum.
static void multiply_packed(int64_t n, int64_t columns, int64_t depth, const bf16 *tokens, const bf16 *weights,
                            int64_t ld, bool exact, ProjectScratch &x) {
  const int64_t depth_tiles = div_up(depth, DEPTH), across = div_up(columns, SIDE), down = div_up(n, SIDE);
  for (int64_t c = 0; c < across; c += 2) {
    const int64_t wide = least<int64_t>(2, across - c);
    float *const sums = x.products + c * SIDE;
    for (int64_t k = 0; k < depth_tiles; k += STEP_TILES) {
      const bool passes = k && exact && !SUMS_APART;
      gemm_tiles(down, wide, least(STEP_TILES, depth_tiles - k), packed_rows(tokens + k * PACKED, depth_tiles),
                 weights + (c * depth_tiles + k) * PACKED, depth_tiles * PACKED, passes ? x.piece : sums,
                 passes ? PANEL : ld, k && !passes);
      for (int64_t i = 0; passes && i < n; ++i)
        for (int64_t v = 0; v < wide * SIDE; v += LANES)
          store(sums + i * ld + v, load(sums + i * ld + v) + load(x.piece + i * PANEL + v));
    }
  }
}

// What project_tile does for more than STREAM_TOKENS tokens.
static void project_tiled(const c2c_project_params &p, const Half &half, const TiledWeights &weights, int64_t b,
                          int64_t first_head, int64_t last_head, int64_t j, int64_t n, ProjectScratch &x) {
  const TileRegisters registers;
  bf16 *tokens = (bf16 *)x.panels;
  pack_raw(p, half, b, j, n, tokens, x);
  if (half.proj_in->data) {
    const int64_t ld = round_up(half.rank, SIDE), depth_tiles = div_up(half.rank, DEPTH);
    multiply_packed(n, half.rank, half.width, tokens, weights.proj_in, ld, false, x);
    tokens += TOKEN_TILE * round_up(half.width, DEPTH);
    for (int64_t t = 0; t < n; ++t) {
      bf16 *const row = packed_row(tokens, t, depth_tiles);
      pack_row(row, 0, x.products + t * ld, half.rank);
      end_packed_row(row, half.rank);
    }
    end_packed_rows(tokens, n, depth_tiles);
  }
  const int64_t ld = round_up(half.out_dim, SIDE);
  for (int64_t head = first_head; head < last_head; ++head) {
    if (half.bias->data) widen_row(x.bias, half.bias->dtype, at(*half.bias, head), half.out_dim);
    multiply_packed(n, half.out_dim, projected_depth(half), tokens, weights.proj + head * head_weights(half), ld,
                    half.out->dtype == C2C_F32, x);
    for (int64_t t = 0; t < n; ++t)
      write_row(p, half, b, head, j + t, x.products + t * ld, half.bias->data ? x.bias : nullptr, x.tables);
  }
}
#else
static bool in_tiles(const c2c_project_params &, const Half &, int32_t) { return false; }
static TiledWeights take_weights(Carver &, const c2c_project_params &, const Half &) { return {}; }
static int64_t weight_units(const c2c_project_params &, const Half &) { return 0; }
static void pack_weights(const c2c_project_params &, const Half &, const TiledWeights &, int64_t) {}
static void project_tiled(const c2c_project_params &, const Half &, const TiledWeights &, int64_t, int64_t, int64_t,
                          int64_t, int64_t, ProjectScratch &) {}
#endif

// Tokens j .. j + n of a tile: by matrix tiles where weights are packed and the tile has enough.
static void project_tokens(const c2c_project_params &p, const Half &half, const TiledWeights &weights, int64_t b,
                           int64_t first_head, int64_t last_head, int64_t j, int64_t n, bool few, ProjectScratch &x) {
  if (weights.proj && !few)
    project_tiled(p, half, weights, b, first_head, last_head, j, n, x);
  else
    project_tile(p, half, b, first_head, last_head, j, n, x);
}
