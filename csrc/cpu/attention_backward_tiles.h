// The backward pass of one block of bfloat16 tokens by matrix tiles (matrix_tiles.h). Included inside an instruction
// set's namespace.
//
// Scores and gradients are s[token][row], so that weights and gradients of scores, rounded to bfloat16 as PyTorch
// rounds them, are rows for the gradients of tokens, P^T dO and dS^T Q, and pairs for those of queries, K^T dS. Queries
// are multiplied as they are stored: scores and gradients of keys are scaled afterwards.

#if defined(C2C_MATRIX_TILES)
static bool differentiates_by_tiles(const Run &run, const c2c_attention_backward_params &params) {
  return params.forward.query.dtype == C2C_BF16 && params.grad_out.dtype == C2C_BF16 && run.key->dtype == C2C_BF16 &&
         run.value->dtype == C2C_BF16;
}

static void pack_backward_rows(const Tile &tile, BackwardScratch &x) {
  const Run &run = tile.run;
  pack_tile_columns((bf16 *)x.q_columns, x.q, run.key_ld, tile.rows, run.key_width);
  pack_tile_pairs((bf16 *)x.q_panels, x.q, run.key_ld, tile.rows, run.key_width);
  pack_tile_columns((bf16 *)x.go_columns, x.go, run.value_ld, tile.rows, run.value_width);
  pack_tile_pairs((bf16 *)x.go_panels, x.go, run.value_ld, tile.rows, run.value_width);
}

// x.s = scaled scores, x.dp = V dO^T of tokens j .. j + n; keys also turned, for the gradients of queries.
static void backward_products(const Tile &tile, int64_t j, int64_t n, BackwardScratch &x, int64_t ld) {
  const Run &run = tile.run;
  const int64_t down = div_up(n, SIDE), across = div_up(tile.rows, SIDE);
  const int64_t key_depth = div_up(run.key_width, DEPTH), value_depth = div_up(run.value_width, DEPTH);
  gemm_tiles(down, across, key_depth, stored_rows(*run.key, tile.b, tile.group, j, n, run.key_dim, x.key_tiles),
             (const bf16 *)x.q_columns, key_depth * PACKED, x.s, ld, false);
  gemm_tiles(down, across, value_depth, stored_rows(*run.value, tile.b, tile.group, j, n, run.value_dim, x.value_tiles),
             (const bf16 *)x.go_columns, value_depth * PACKED, x.dp, ld, false);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = 0; r < tile.rows; r += LANES) store(x.s + t * ld + r, load(x.s + t * ld + r) * tile.p.scale);
  pack_tile_turned(x.turned_keys, (const bf16 *)at(*run.key, tile.b, tile.group, j), run.key->stride[2], n,
                   run.key_dim);
}

// grad[n][width] += s [n][rows] times packed pairs of rows, times `scale`; `sums` is scratch of [n, padded][ld_sums].
static void add_token_gradients(const Tile &tile, int64_t n, const float *s, int64_t ld, const float *pairs,
                                int64_t width, float *sums, int64_t ld_sums, float scale, float *grad,
                                BackwardScratch &x) {
  const int64_t depth_tiles = div_up(tile.rows, DEPTH);
  for (int64_t t = 0; t < n; ++t) {
    bf16 *const row = packed_row(x.weight_tiles, t, depth_tiles);
    pack_row(row, 0, s + t * ld, tile.rows);
    end_packed_row(row, tile.rows);
  }
  end_packed_rows(x.weight_tiles, n, depth_tiles);
  gemm_tiles(div_up(n, SIDE), div_up(width, SIDE), depth_tiles, packed_rows(x.weight_tiles, depth_tiles),
             (const bf16 *)pairs, depth_tiles * PACKED, sums, ld_sums, false);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t d = 0; d < width; ++d) grad[t * width + d] += sums[t * ld_sums + d] * scale;
}

// From weights x.s and gradients of scores x.dp: adds to the gradients of tokens and to x.grad_q, [key_ld][rows].
static void add_gradients(const Tile &tile, int64_t n, float *grad_key, float *grad_value, BackwardScratch &x,
                          int64_t ld) {
  const Run &run = tile.run;
  add_token_gradients(tile, n, x.s, ld, x.go_panels, run.value_width, x.v, run.value_ld, 1.0f, grad_value, x);
  add_token_gradients(tile, n, x.dp, ld, x.q_panels, run.key_width, x.k, run.key_ld, tile.p.scale, grad_key, x);
  const int64_t depth_tiles = div_up(n, DEPTH);
  pack_tile_pairs(x.weight_tiles, x.dp, ld, n, tile.rows);
  gemm_tiles(div_up(run.key_width, SIDE), div_up(tile.rows, SIDE), depth_tiles, packed_rows(x.turned_keys, depth_tiles),
             x.weight_tiles, depth_tiles * PACKED, x.grad_q, round_up(tile.rows, PANEL), true);
}

// x.grad_q from [key_ld][rows] to [rows][key_ld], by way of x.q, which is not needed any more.
static void turn_query_gradients(const Tile &tile, BackwardScratch &x) {
  const int64_t ld = round_up(tile.rows, PANEL), key_ld = tile.run.key_ld;
  for (int64_t d = 0; d < key_ld; d += LANES) transpose_rows(x.grad_q + d * ld, ld, LANES, tile.rows, x.q + d, key_ld);
  memcpy(x.grad_q, x.q, tile.rows * key_ld * sizeof(float));
}
#else
static bool differentiates_by_tiles(const Run &, const c2c_attention_backward_params &) { return false; }
static void pack_backward_rows(const Tile &, BackwardScratch &) {}
static void backward_products(const Tile &, int64_t, int64_t, BackwardScratch &, int64_t) {}
static void add_gradients(const Tile &, int64_t, float *, float *, BackwardScratch &, int64_t) {}
static void turn_query_gradients(const Tile &, BackwardScratch &) {}
#endif
