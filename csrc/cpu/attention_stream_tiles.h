// Attention of few query rows, as many as a tile has, over bfloat16 tokens by AMX. Included inside an instruction set's
// namespace.
//
// Dot products of pairs (rows_pairs.h) are no match for it: Intel starts one every second cycle, and a row's need sums
// across a vector; a tile multiplies 16 tokens by all rows in 16 cycles. Keys are read where they lie, [token][row]
// scores are turned to rows for the softmax, and values are laid in pairs of tokens, which takes no shuffle but those
// of interleaving.

#if defined(C2C_AMX)
// Whether a tile is streamed by AMX: not the few rows of a run that pairs read in one pass, as fast as memory gives it.
static bool streams_tiles(const Run &run, const c2c_attention_params &p, int64_t rows) {
  return rows <= SIDE && reads_tiles(run, p) && (rows > MAX_ROWS || !reads_pairs(run, p, rows));
}

// s[row][BLOCK] from columns[token][SIDE]: n tokens, up to a multiple of 16.
static void turn_scores(const float *columns, int64_t n, int64_t rows, float *s) {
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t t = 0; t < n; t += LANES) {
      __m512 part[4];  // four rows of tokens i, i + 4, i + 8 and i + 12
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float *from = columns + (t + i) * SIDE + r;
        part[i] = _mm512_maskz_broadcast_f32x4(0x000f, _mm_loadu_ps(from));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x00f0, _mm_loadu_ps(from + 4 * SIDE));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x0f00, _mm_loadu_ps(from + 8 * SIDE));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0xf000, _mm_loadu_ps(from + 12 * SIDE));
      }
      const __m512 low = _mm512_unpacklo_ps(part[0], part[1]), low_after = _mm512_unpacklo_ps(part[2], part[3]);
      const __m512 high = _mm512_unpackhi_ps(part[0], part[1]), high_after = _mm512_unpackhi_ps(part[2], part[3]);
      float *const to = s + r * BLOCK + t;
      store(to, (V)_mm512_shuffle_ps(low, low_after, 0x44));
      if (r + 1 < rows) store(to + BLOCK, (V)_mm512_shuffle_ps(low, low_after, 0xee));
      if (r + 2 < rows) store(to + 2 * BLOCK, (V)_mm512_shuffle_ps(high, high_after, 0x44));
      if (r + 3 < rows) store(to + 3 * BLOCK, (V)_mm512_shuffle_ps(high, high_after, 0xee));
    }
}

// Scores columns[token][SIDE] of a block; `next` is what is read afterwards.
static void multiply_keys(const Tile &tile, Tokens block, const bf16 *queries, float *columns, const void *next,
                          TileScratch &x) {
  const Run &run = tile.run;
  const BlockKeys keys = block_keys(tile, block.j, block.n, x);
  const int64_t stride = run.key->stride[2];
  for (int64_t k = 0; k < keys.products; ++k) {
    const int64_t head = run.absorbed ? k : tile.group;
    const bf16 *const tokens = (const bf16 *)at(*run.key, tile.b, head, block.j);
    const bf16 *const after = k + 1 < keys.products ? tokens + run.key->stride[1] : (const bf16 *)next;
    const Ahead ahead(tokens, stride, block.n, run.key_dim * sizeof(bf16), after);
    TileRows rows = keys.rows;
    rows.data += k * keys.next;
    for (int64_t t = 0; t < block.n; t += 2 * SIDE, rows.data += 2 * rows.down) {
      const int64_t count = least(2 * SIDE, block.n - t);
      for (int64_t i = 0; ahead.steps && i < count; ++i) ahead.ask_token(t + i, run.key_dim * sizeof(bf16));
      for (int64_t term = 0; term < query_terms(run); ++term)
        gemm_tiles(div_up(count, SIDE), 1, keys.depth_tiles, rows,
                   queries + term * query_tiles_size(tile) + k * keys.depth_tiles * PACKED, 0, columns + t * SIDE, SIDE,
                   term + k > 0);
    }
  }
}

// Values of a block in pairs of tokens, tiles [value_width / 16][block / 32]; `next` is what is read afterwards.
static void pair_values(const Tile &tile, Tokens block, const void *next, bf16 *to) {
  const Run &run = tile.run;
  const int64_t stride = run.value->stride[2], depth = div_up(block.n, DEPTH) * PACKED;
  for (int64_t part = 0; part < run.parts; ++part) {
    const bf16 *const tokens = (const bf16 *)at(*run.value, tile.b, run.absorbed ? part : tile.group, block.j);
    const bf16 *const after = part + 1 < run.parts ? tokens + run.value->stride[1] : (const bf16 *)next;
    const Ahead ahead(tokens, stride, block.n, run.value_dim * sizeof(bf16), after);
    bf16 *const tiles = to + part * run.value_dim / SIDE * depth;
    for (int64_t t = 0; t < round_up(block.n, DEPTH); t += 2) {
      for (int64_t i = t; ahead.steps && i < least(t + 2, block.n); ++i)
        ahead.ask_token(i, run.value_dim * sizeof(bf16));
      pack_pair(tiles + t / DEPTH * PACKED + t % DEPTH * SIDE, depth, tokens + t * stride, stride, block.n - t,
                run.value_dim);
    }
  }
}

static void stream_by_tiles(Tile &tile, TileScratch &x) {
  const TileRegisters registers;
  const Run &run = tile.run;
  const int64_t across = div_up(run.value_width, SIDE);
  float *const columns = x.s + 2 * tile.rows * BLOCK;
  bf16 *const weights = x.weight_tiles;
  pack_queries(tile, x);
  auto dot = [&](Tokens block, Tokens before, float *s) {
    multiply_keys(tile, block, (const bf16 *)x.panels, columns,
                  at(*run.value, tile.b, run.absorbed ? 0 : tile.group, before.j), x);
    turn_scores(columns, block.n, tile.rows, s);
  };
  auto weigh = [&](Tokens block, int64_t after, const float *s) {
    pair_values(tile, block, at(*run.key, tile.b, run.absorbed ? 0 : tile.group, after), x.value_tiles);
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t t = 0; t < block.n; t += DEPTH)
        store_packed(weights + r * BLOCK + t, (V)load_32(s + r * BLOCK + t, block.n - t));
    const int64_t depth_tiles = div_up(block.n, DEPTH);
    gemm_tiles(1, across, depth_tiles, {weights, BLOCK, 0, DEPTH}, x.value_tiles, depth_tiles * PACKED, x.acc,
               run.value_ld, true);
  };
  stream_blocks(tile, run.absorbed ? 1.0f : tile.p.scale, x, dot, weigh);
}
#else
static bool streams_tiles(const Run &, const c2c_attention_params &, int64_t) { return false; }
static void stream_by_tiles(Tile &, TileScratch &) {}
#endif
