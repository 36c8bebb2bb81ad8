// Attention of many query rows over bfloat16 tokens by matrix tiles (matrix_tiles.h). Included inside an instruction
// set's namespace.
//
// Scores are transposed as in attention_block.h, s[token][row] = K Q^T, and so are the sums, [value][row] = V^T P^T:
// weights P, rounded to bfloat16 as PyTorch's attention rounds them, are packed where they are computed, tokens in
// pairs. Queries are multiplied as they are stored and scores scaled afterwards; folded queries, which are float32, are
// taken as the sum of three bfloat16 terms, which hold all their bits.

#if defined(C2C_MATRIX_TILES)
static int64_t query_terms(const Run &run) { return run.absorbed ? 3 : 1; }

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
  for (int64_t term = 0; term < query_terms(run); ++term) {
    for (int64_t i = 0; term && i < tile.rows * run.key_ld; i += LANES) {
      const V q = load(x.q + i);
      bf16 before[LANES];
      store(before, q);
      store(x.q + i, q - load(before));
    }
    pack_tile_columns((bf16 *)x.panels + term * query_tiles_size(tile), x.q, run.key_ld, tile.rows, run.key_width);
  }
}

// Tokens j .. j + n of one head: where they lie, if they are whole tiles, else packed.
static TileRows stored_rows(const c2c_tensor &t, int64_t b, int64_t head, int64_t j, int64_t n, int64_t dim,
                            bf16 *packed) {
  const int64_t depth_tiles = div_up(dim, DEPTH), stride = t.stride[2];
  if (dim % DEPTH == 0 && n % SIDE == 0) return {(const bf16 *)at(t, b, head, j), stride, SIDE * stride, DEPTH};
  for (int64_t i = 0; i < n; ++i) {
    bf16 *const row = packed_row(packed, i, depth_tiles);
    pack_row(row, 0, (const bf16 *)at(t, b, head, j + i), dim);
    end_packed_row(row, dim);
  }
  end_packed_rows(packed, n, depth_tiles);
  return packed_rows(packed, depth_tiles);
}

// Keys of a block: one product of all parts, or one for each, `next` numbers apart.
struct BlockKeys {
  TileRows rows;
  int64_t products, depth_tiles, next;
};

// Keys j .. j + n of all parts of a run.
static BlockKeys block_keys(const Tile &tile, int64_t j, int64_t n, TileScratch &x) {
  const Run &run = tile.run;
  const int64_t depth_tiles = div_up(run.key_width, DEPTH), stride = run.key->stride[2];
  if (run.parts == 1) {
    const int64_t head = run.absorbed ? 0 : tile.group;
    return {stored_rows(*run.key, tile.b, head, j, n, run.key_dim, x.key_tiles), 1, depth_tiles, 0};
  }
  if (run.key_dim % DEPTH == 0 && n % SIDE == 0)
    return {{(const bf16 *)at(*run.key, tile.b, 0, j), stride, SIDE * stride, DEPTH},
            run.parts,
            run.key_dim / DEPTH,
            run.key->stride[1]};
  for (int64_t t = 0; t < n; ++t) {
    bf16 *const row = packed_row(x.key_tiles, t, depth_tiles);
    for (int64_t part = 0; part < run.parts; ++part)
      pack_row(row, part * run.key_dim, (const bf16 *)at(*run.key, tile.b, part, j + t), run.key_dim);
    end_packed_row(row, run.key_width);
  }
  end_packed_rows(x.key_tiles, n, depth_tiles);
  return {packed_rows(x.key_tiles, depth_tiles), 1, depth_tiles, 0};
}

// Rows r .. r + count of a tile, a panel at most, and the leading tokens of a block that some of them see.
struct TilePanel {
  int64_t r, count, tokens;
};

constexpr int64_t WIDEST_ASKED = 512;  // values of a wider block leave the second-level cache before they are used

// Asks for tokens j .. j + n of one part (sharer head).
static ALWAYS_INLINE void ask_tokens(const Tile &tile, const c2c_tensor &tokens, int64_t dim, int64_t part, int64_t j,
                                     int64_t n) {
  const bf16 *token = (const bf16 *)at(tokens, tile.b, tile.run.absorbed ? part : tile.group, j);
  for (int64_t t = 0; t < n; ++t, token += tokens.stride[2])
    for (int64_t d = 0; d < dim; d += DEPTH) __builtin_prefetch(token + d);
}

// Asks for the keys of tokens j .. j + n, of which the share that value dims first .. last are of all value dims: the
// next block's, though another thread may come to it.
static ALWAYS_INLINE void ask_keys(const Tile &tile, int64_t j, int64_t n, int64_t first, int64_t last) {
  const Run &run = tile.run;
  n = least(n, run.len - j);
  const int64_t rows = run.parts * n;
  for (int64_t row = rows * first / run.value_width; row < rows * last / run.value_width; ++row)
    ask_tokens(tile, *run.key, run.key_dim, row / n, j + row % n, 1);
}

// Scores of a panel, s[token][ld]. Where rows fill one vector at most a block's keys and values take as long to read as
// to multiply, and values are asked for meanwhile.
static void score_panel(const Tile &tile, const TilePanel &panel, const BlockKeys &keys, const bf16 *queries, int64_t j,
                        float *s, int64_t ld) {
  const int64_t depth_tiles = div_up(tile.run.key_width, DEPTH), across = div_up(panel.count, SIDE);
  const bool asks = tile.rows <= SIDE && tile.run.value_width <= WIDEST_ASKED;
  const int64_t step = asks ? SIDE : panel.tokens;
  queries += panel.r * depth_tiles * DEPTH;
  for (int64_t term = 0; term < query_terms(tile.run); ++term)
    for (int64_t k = 0; k < keys.products; ++k) {
      const bf16 *const columns = queries + term * query_tiles_size(tile) + k * keys.depth_tiles * PACKED;
      TileRows rows = keys.rows;
      rows.data += k * keys.next;
      for (int64_t t = 0; t < panel.tokens; t += step, rows.data += step / SIDE * rows.down) {
        const int64_t count = least(step, panel.tokens - t);
        if (asks && term == 0) ask_tokens(tile, *tile.run.value, tile.run.value_dim, k, j + t, count);
        gemm_tiles(div_up(count, SIDE), across, keys.depth_tiles, rows, columns, depth_tiles * PACKED, s + t * ld, ld,
                   term + k > 0);
      }
    }
}

// Column softmax of a panel's s[token][ld] times `scale`; packs the weights, zeros behind them.
static void softmax_panel(const Tile &tile, const TilePanel &panel, const float *s, int64_t ld, float scale,
                          TileScratch &x, int64_t ldc) {
  const int64_t n = panel.tokens;
  for (int64_t r = panel.r; r < panel.r + panel.count; r += LANES, s += LANES) {
    const Raise raise = raise_max(s, ld, n, load(x.row_max + r), scale);
    V total = load(x.row_sum + r) * raise.factor;
    auto weight = [&](int64_t t) __attribute__((always_inline)) {
      V score = load(s + t * ld) * scale;
      keep_in_register(score);  // rounded as the maximum is: a fused difference may be half an ulp of the score above 0
      const V found = exp_of_difference(raise.base, score);
      total += found;
      return found;
    };
    bf16 *to = x.weight_tiles + (r - panel.r) * TILED_BLOCK;
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

// Values j .. j + n, turned.
static TileRows turned_values(const Tile &tile, int64_t j, int64_t n, TileScratch &x) {
  const Run &run = tile.run;
  const int64_t depth_tiles = div_up(n, DEPTH);
  for (int64_t part = 0; part < run.parts; ++part)
    pack_tile_turned(x.value_tiles + part * run.value_dim * depth_tiles * DEPTH,
                     (const bf16 *)at(*run.value, tile.b, run.absorbed ? part : tile.group, j), run.value->stride[2], n,
                     run.value_dim);
  return packed_rows(x.value_tiles, depth_tiles);
}

// Values j .. j + n as pairs of two tokens' numbers, [token / 2][value_ld][2].
static const bf16 *paired_values(const Tile &tile, int64_t j, int64_t n, TileScratch &x) {
  const Run &run = tile.run;
  const int64_t dim = run.value_dim, stride = run.value->stride[2];
  for (int64_t part = 0; part < run.parts; ++part) {
    const bf16 *even = (const bf16 *)at(*run.value, tile.b, run.absorbed ? part : tile.group, j);
    bf16 *to = x.value_tiles + part * dim * 2;
    for (int64_t t = 0; t < n; t += 2, even += 2 * stride, to += 2 * run.value_ld) {
      const bf16 *const odd = t + 1 < n ? even + stride : nullptr;
      auto pair = [&](int64_t d, int64_t there) __attribute__((always_inline)) {
        V first, second;
        interleave(load_32(even + d, there), odd ? load_32(odd + d, there) : _mm512_setzero_si512(), &first, &second);
        store_packed(to + 2 * d, first);
        if (there > SIDE) store_packed(to + 2 * d + DEPTH, second);
      };
      int64_t d = 0;
      for (; d + DEPTH <= dim; d += DEPTH) pair(d, DEPTH);
      if (d < dim) pair(d, dim - d);
    }
  }
  return x.value_tiles;
}

// C[dim][LANES] += V^T P^T for rows that fill one vector at most: pairs of values [token / 2][ld][2] are broadcast, and
// need not be turned; weights lie as `softmax_panel` packs them.
template <class F>
static void weigh_paired_values(const bf16 *values, int64_t ld, int64_t dim, const bf16 *weights, int64_t n, float *c,
                                int64_t ldc, F ask) {
  constexpr int64_t DIMS = 8;
  for (int64_t d = 0; d < dim; d += DIMS) {
    ask(d, DIMS);
    with_count<DIMS>(least(DIMS, dim - d), [&](auto dims) __attribute__((always_inline)) {
      constexpr int COUNT = decltype(dims)::value;
      V sum[COUNT] = {};
      for (int64_t t = 0; t < n; t += 2) {
        V weight = load((const float *)(weights + t * SIDE));
        keep_in_register(weight);
        const bf16 *const pairs = values + t * ld + d * 2;
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
          int32_t pair;
          memcpy(&pair, pairs + 2 * i, sizeof(pair));
          sum[i] = add_pairs(sum[i], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weight);
        }
      }
      for (int i = 0; i < COUNT; ++i) store(c + (d + i) * ldc, load(c + (d + i) * ldc) + sum[i]);
    });
  }
}

// Tokens j .. j + n against all rows. `mask` is null where there is none.
static void attend_block(const Tile &tile, int64_t j, int64_t n, const float *mask, TileScratch &x, int64_t ldc) {
  const Run &run = tile.run;
  const bool fused = only_limits(tile, mask);
  const int64_t ld = fused ? PANEL : round_up(tile.rows, PANEL) + 16;
  const bool paired = tile.rows <= SIDE;
  const BlockKeys keys = block_keys(tile, j, n, x);
  const TileRows values = paired ? TileRows{} : turned_values(tile, j, n, x);
  const bf16 *const queries = (const bf16 *)x.panels;
  auto each_panel = [&](auto f) {
    for (int64_t r = 0; r < tile.rows; r += PANEL) {
      const TilePanel panel = {r, least<int64_t>(PANEL, tile.rows - r), tile.visible(r, n)};
      if (panel.tokens) f(panel, fused ? x.s : x.s + r);
    }
  };
  float scale = run.absorbed ? 1.0f : tile.p.scale;
  if (!fused) {
    each_panel([&](const TilePanel &panel, float *s) { score_panel(tile, panel, keys, queries, j, s, ld); });
    for (int64_t t = 0; scale != 1.0f && t < n; ++t)
      for (int64_t r = 0; r < tile.rows; r += LANES) store(x.s + t * ld + r, load(x.s + t * ld + r) * scale);
    scale = 1.0f;
    adjust_columns(tile, n, x.s, ld, run.absorbed ? x.row_bias : nullptr, mask, nullptr);
  }
  each_panel([&](const TilePanel &panel, float *s) {
    if (fused) {
      score_panel(tile, panel, keys, queries, j, s, ld);
      if (tile.limited) limit_panel(tile, panel.r, panel.tokens, s, ld);
    }
    softmax_panel(tile, panel, s, ld, scale, x, ldc);
    if (paired)
      weigh_paired_values(paired_values(tile, j, n, x), run.value_ld, run.value_width, x.weight_tiles, panel.tokens,
                          x.columns, ldc, [&](int64_t d, int64_t dims) { ask_keys(tile, j + n, n, d, d + dims); });
    else
      gemm_tiles(div_up(run.value_width, SIDE), div_up(panel.count, SIDE), div_up(panel.tokens, DEPTH), values,
                 x.weight_tiles, TILED_BLOCK * SIDE, x.columns + panel.r, ldc, true);
  });
}

static void attend_by_tiles(Tile &tile, TileScratch &x) {
  const TileRegisters registers;
  const Run &run = tile.run;
  const int64_t ldc = round_up(tile.rows, PANEL);
  const bool masked = !run.segment && tile.p.mask.data;
  tile.block = TILED_BLOCK;
  tile.row_lo = x.row_lo;
  tile.row_hi = x.row_hi;
  pack_queries(tile, x);
  load_states(tile, x);
  bool resumed = false;
  for (int64_t r = 0; r < tile.rows; ++r) resumed = resumed || x.state[r].max != -INF;
  if (!resumed) memset(x.columns, 0, run.value_ld * ldc * sizeof(float));
  for (int64_t r = 0; resumed && r < tile.rows; r += LANES)
    transpose_rows(x.acc + r * run.value_ld, run.value_ld, least<int64_t>(LANES, tile.rows - r), run.value_ld,
                   x.columns + r, ldc);
  for (int64_t j = tile.begin; j < tile.end; j += tile.block) {
    const int64_t n = least(tile.block, tile.end - j);
    if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) continue;
    attend_block(tile, j, n, masked ? x.mask : nullptr, x, ldc);
  }
  for (int64_t d = 0; d < run.value_ld; d += LANES)
    transpose_rows(x.columns + d * ldc, ldc, LANES, tile.rows, x.acc + d, run.value_ld);
  keep_states(tile, x);
}
#else
static bool reads_tiles(const Run &, const c2c_attention_params &) { return false; }
static void attend_by_tiles(Tile &, TileScratch &) {}
#endif
