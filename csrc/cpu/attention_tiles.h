// Attention of many query rows over bfloat16 tokens by matrix tiles (amx.h). Included inside an instruction set's
// namespace.
//
// Scores are transposed as in attention_block.h, s[token][row] = K Q^T, and so are the sums, [value][row] = V^T P^T:
// weights P, rounded to bfloat16 as PyTorch's attention rounds them, are packed where they are computed, tokens in
// pairs. Queries are multiplied as they are stored and scores scaled afterwards; folded queries, which are float32, are
// taken as the sum of two bfloat16 terms.

#if defined(C2C_AMX)
constexpr int64_t BLOCK_DEPTH = BLOCK / DEPTH;

// Whether many rows attend to a run by tiles.
static bool reads_tiles(const Run &run, const c2c_attention_params &p) {
  if (p.query.dtype != C2C_BF16 || run.key->dtype != C2C_BF16 || run.value->dtype != C2C_BF16) return false;
  return !run.key_scale && !run.value_scale && (run.parts == 1 || run.value_dim % SIDE == 0);
}

static int64_t query_tiles_size(const Tile &tile) {
  return round_up(tile.rows, SIDE) * round_up(tile.run.key_width, DEPTH);
}

static void pack_queries(const Tile &tile, TileScratch &x) {
  const Run &run = tile.run;
  bf16 *const first = (bf16 *)x.panels;
  pack_tile_columns(first, x.q, run.key_ld, tile.rows, run.key_width);
  if (!run.absorbed) return;
  for (int64_t i = 0; i < tile.rows * run.key_ld; i += LANES) {
    const V q = load(x.q + i);
    bf16 term[LANES];
    store(term, q);
    store(x.q + i, q - load(term));
  }
  pack_tile_columns(first + query_tiles_size(tile), x.q, run.key_ld, tile.rows, run.key_width);
}

// Keys j .. j + n: where they lie, if they are whole tiles, else packed.
static TileRows block_keys(const Tile &tile, int64_t j, int64_t n, TileScratch &x) {
  const Run &run = tile.run;
  const int64_t depth_tiles = div_up(run.key_width, DEPTH), stride = run.key->stride[2];
  if (run.parts == 1 && run.key_dim % DEPTH == 0 && n % SIDE == 0)
    return {(const bf16 *)at(*run.key, tile.b, run.absorbed ? 0 : tile.group, j), stride, SIDE * stride, DEPTH};
  for (int64_t t = 0; t < n; ++t) {
    bf16 *const row = packed_row(x.key_tiles, t, depth_tiles);
    for (int64_t part = 0; part < run.parts; ++part)
      pack_row(row, part * run.key_dim, (const bf16 *)at(*run.key, tile.b, run.absorbed ? part : tile.group, j + t),
               run.key_dim);
    end_packed_row(row, run.key_width);
  }
  end_packed_rows(x.key_tiles, n, depth_tiles);
  return packed_rows(x.key_tiles, depth_tiles);
}

// Scores of a block, s[token][ld].
static void score_tiles(const Tile &tile, int64_t j, int64_t n, TileScratch &x, int64_t ld) {
  const Run &run = tile.run;
  const int64_t depth_tiles = div_up(run.key_width, DEPTH);
  const TileRows keys = block_keys(tile, j, n, x);
  each_visible(tile, n, [&](int64_t r, int64_t count, int64_t tokens) {
    for (int64_t term = 0; term < (run.absorbed ? 2 : 1); ++term)
      gemm_tiles(div_up(tokens, SIDE), div_up(count, SIDE), depth_tiles, keys,
                 (const bf16 *)x.panels + term * query_tiles_size(tile) + r * depth_tiles * DEPTH, depth_tiles * PACKED,
                 x.s + r, ld, term > 0);
  });
  if (run.absorbed || tile.p.scale == 1.0f) return;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = 0; r < tile.rows; r += LANES) store(x.s + t * ld + r, load(x.s + t * ld + r) * tile.p.scale);
}

// Column softmax of s[block][ld] over the tokens that rows see; packs the weights, zeros behind them.
static void softmax_tiles(const Tile &tile, int64_t block, TileScratch &x, int64_t ld, int64_t ldc) {
  for (int64_t r = 0; r < tile.rows; r += LANES) {
    const int64_t n = tile.visible(r / PANEL * PANEL, block);
    const Raise raise = raise_max(x.s + r, ld, n, load(x.row_max + r));
    V total = load(x.row_sum + r) * raise.factor;
    auto weight = [&](int64_t t) __attribute__((always_inline)) {
      const V found = vexp(load(x.s + t * ld + r) - raise.base);
      total += found;
      return found;
    };
    bf16 *to = x.weight_tiles + r * BLOCK_DEPTH * DEPTH;
    int64_t t = 0;
    for (; t + 2 <= n; t += 2, to += DEPTH) {
      const V even = weight(t), odd = weight(t + 1);
      store_packed(to, pair_up(even, odd));
    }
    if (t < n) {
      store_packed(to, pair_up(weight(t), V{}));
      t += 2, to += DEPTH;
    }
    for (; t < round_up(n, DEPTH); t += 2, to += DEPTH) store_packed(to, V{});
    store(x.row_max + r, raise.largest);
    store(x.row_sum + r, total);
    if (!rescales(raise.factor)) continue;
    for (int64_t d = 0; d < tile.run.value_width; ++d)
      store(x.columns + d * ldc + r, load(x.columns + d * ldc + r) * raise.factor);
  }
}

// Adds the block's values times weights to the sums of all rows.
static void weigh_tiles(const Tile &tile, int64_t j, int64_t n, TileScratch &x, int64_t ldc) {
  const Run &run = tile.run;
  const int64_t depth_tiles = div_up(n, DEPTH);
  for (int64_t part = 0; part < run.parts; ++part)
    pack_tile_pairs<true>(x.value_tiles + part * run.value_dim * depth_tiles * DEPTH,
                          (const bf16 *)at(*run.value, tile.b, run.absorbed ? part : tile.group, j),
                          run.value->stride[2], n, run.value_dim);
  each_visible(tile, n, [&](int64_t r, int64_t count, int64_t tokens) {
    gemm_tiles(div_up(run.value_width, SIDE), div_up(count, SIDE), div_up(tokens, DEPTH),
               packed_rows(x.value_tiles, depth_tiles), x.weight_tiles + r * BLOCK_DEPTH * DEPTH, BLOCK_DEPTH * PACKED,
               x.columns + r, ldc, true);
  });
}

static void attend_by_tiles(Tile &tile, TileScratch &x) {
  const TileRegisters registers;
  const Run &run = tile.run;
  const int64_t ld = round_up(tile.rows, PANEL) + 16, ldc = round_up(tile.rows, PANEL);
  const bool masked = !run.segment && tile.p.mask.data;
  tile.row_lo = x.row_lo;
  tile.row_hi = x.row_hi;
  pack_queries(tile, x);
  load_states(tile, x);
  for (int64_t r = 0; r < tile.rows; r += LANES)
    transpose_rows(x.acc + r * run.value_ld, run.value_ld, least<int64_t>(LANES, tile.rows - r), run.value_ld,
                   x.columns + r, ldc);
  for (int64_t j = tile.begin; j < tile.end; j += BLOCK) {
    const int64_t n = least(BLOCK, tile.end - j);
    if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) continue;
    score_tiles(tile, j, n, x, ld);
    adjust_columns(tile, n, x.s, ld, run.absorbed ? x.row_bias : nullptr, masked ? x.mask : nullptr, nullptr);
    softmax_tiles(tile, n, x, ld, ldc);
    weigh_tiles(tile, j, n, x, ldc);
  }
  for (int64_t d = 0; d < run.value_ld; d += LANES)
    transpose_rows(x.columns + d * ldc, ldc, LANES, tile.rows, x.acc + d, run.value_ld);
  keep_states(tile, x);
}
#else
static bool reads_tiles(const Run &, const c2c_attention_params &) { return false; }
static void attend_by_tiles(Tile &, TileScratch &) {}
#endif
