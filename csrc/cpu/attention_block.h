// Attention of many query rows: register-blocked products on transposed scores, s[token][row], which need no horizontal
// sums. Included inside an instruction set's namespace.

// What a block of scores means for LANES rows: the base of its exponentials, and the factor of all sums so far.
struct Raise {
  V base, factor, largest;
};

// Takes scores of n tokens, s[n][ld] times `scale` > 0, into the maximum of LANES rows.
static ALWAYS_INLINE Raise raise_max(const float *s, int64_t ld, int64_t n, V old, float scale = 1.0f) {
  V largest = set1(-INF);
  VI broken = {};
  for (int64_t t = 0; t < n; ++t) {
    V score = load(s + t * ld);
    largest = vmax(score, largest);
    broken |= score != score;
  }
  largest = vmax(largest * scale, old);
  largest = select(broken, largest + __builtin_nanf(""), largest);
  const V base = select(largest == set1(-INF), V{}, largest);
  // Of a row that has seen nothing the sums are 0: any factor will do, and 1 costs nothing.
  const VI unchanged = (old == largest) | (old == set1(-INF));
  return {base, select(unchanged, set1(1.0f), vexp(old - base)), largest};
}

// Whether some of LANES rows' sums so far change.
static ALWAYS_INLINE bool rescales(V factor) { return any(factor != set1(1.0f)); }

// exp(x - base) for x <= base, within 4 ulp where they are close; exactly 0 from 87.3 apart and for x = -inf. What vexp
// does with fewer instructions: 2^n 2^r with the power of two added to the exponent. NaN stays NaN: a broken row's base
// is the NaN without a payload, whose shifted bits change nothing, and comes first, where it decides over the score's.
static ALWAYS_INLINE V exp_of_difference(V base, V x) {
  const V apart = base - x;
  const V shifted = apart * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const V r = apart * -1.44269504f - (shifted - 12582912.0f);
  V p = set1(1.5353362e-4f);
  p = p * r + 1.3398874e-3f;
  p = p * r + 9.6184373e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314720e-1f;
  p = p * r + 1.0f;
  const VI power = bit_cast<VI>(shifted) << 23;
#if defined(C2C_AVX512)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)apart, (__m512)set1(87.3f), _CMP_NGT_UQ);
  return (V)_mm512_maskz_add_epi32(counts, (__m512i)p, (__m512i)power);
#else
  return bit_cast<V>((bit_cast<VI>(p) + power) & ~(apart > set1(87.3f)));
#endif
}

#if LANES != 16 || defined(C2C_MATRIX_TILES)
// Whether nothing happens to scores between product and softmax but that some are hidden by their row's limits: then a
// panel goes through all steps while it is in the first-level cache.
static bool only_limits(const Tile &tile, bool masked) {
  return !tile.run.absorbed && !masked && !tile.gated && !(tile.p.softcap > 0.0f) &&
         (!tile.limited || tile.rows_limited()) && tile.p.scale > 0.0f;
}
#endif

// f(first row, count, tokens): rows in whole panels with the leading tokens of a block that they see. All rows at once
// where they see the same.
template <class F>
static ALWAYS_INLINE void each_visible(const Tile &tile, int64_t n, F f) {
  if (!tile.rows_limited()) return f(0, tile.rows, n);
  for (int64_t r = 0; r < tile.rows; r += PANEL) {
    const int64_t count = least<int64_t>(PANEL, tile.rows - r), tokens = tile.visible(r, n);
    if (tokens) f(r, count, tokens);
  }
}

// Scores of a block, s[token][ld]. Float32 tokens are read where they lie; others are widened a few at a time, so that
// they are still in the first-level cache when they are multiplied.
static void score_block(const Tile &tile, int64_t j, int64_t n, TileScratch &x, int64_t ld, Upcoming &upcoming) {
  const Run &run = tile.run;
  const bool direct = run.key->dtype == C2C_F32 && !run.key_scale;
  const int64_t piece = direct ? n : WIDENED_TOKENS, parts = direct ? run.parts : 1, dim = run.key_width / parts;
  for (int64_t t = 0; t < n; t += piece) {
    if (!direct)
      widen_tokens(run, *run.key, run.key_scale, run.key_dim, tile.b, tile.group, j + t, least(piece, n - t), x.k,
                   run.key_ld);
    each_visible(tile, n, [&](int64_t r, int64_t count, int64_t tokens) {
      for (int64_t part = 0; part < parts; ++part) {
        const float *keys = direct ? (const float *)at(*run.key, tile.b, run.absorbed ? part : tile.group, j) : x.k;
        gemm(least(piece, tokens - t), count, dim, keys, direct ? run.key->stride[2] : run.key_ld, 1,
             x.panels + r * run.key_width + part * dim * PANEL, PANEL, run.key_width * PANEL, x.s + t * ld + r, ld,
             part > 0, &upcoming);
      }
    });
  }
}

// Maxima and sums of a tile's rows side by side, and back.
static void load_states(const Tile &tile, TileScratch &x) {
  for (int64_t r = 0; r < round_up(tile.rows, PANEL); ++r) {
    x.row_max[r] = r < tile.rows ? x.state[r].max : -INF;
    x.row_sum[r] = r < tile.rows ? x.state[r].sum : 0.0f;
  }
}
static void keep_states(const Tile &tile, TileScratch &x) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    x.state[r].max = x.row_max[r];
    x.state[r].sum = x.row_sum[r];
  }
}

#if LANES == 16
// Column softmax of s[block][ld] over the tokens that rows see; leaves the factor of every row's sums so far.
static bool softmax_columns(const Tile &tile, float *s, int64_t ld, int64_t block, int64_t rows, TileScratch &x) {
  bool rescale = false;
  for (int64_t r = 0; r < rows; r += LANES) {
    const int64_t n = tile.visible(r / PANEL * PANEL, block);
    const Raise raise = raise_max(s + r, ld, n, load(x.row_max + r));
    V total = load(x.row_sum + r) * raise.factor;
    for (int64_t t = 0; t < n; ++t) {
      const V weight = exp_of_difference(raise.base, load(s + t * ld + r));
      store(s + t * ld + r, weight);
      total += weight;
    }
    store(x.row_max + r, raise.largest);
    store(x.row_sum + r, total);
    store(x.factor + r, raise.factor);
    rescale = rescale || rescales(raise.factor);
  }
  return rescale;
}

// Adds the block's values times weights, s[token][ld], to the sums of all rows.
static void weigh_block(const Tile &tile, int64_t j, int64_t n, TileScratch &x, int64_t ld, Upcoming &upcoming) {
  const Run &run = tile.run;
  const bool direct = run.value->dtype == C2C_F32 && !run.value_scale && run.value_dim % LANES == 0;
  const int64_t parts = direct ? run.parts : 1, dim = run.value_width / parts;
  if (!direct)
    widen_tokens(run, *run.value, run.value_scale, run.value_dim, tile.b, tile.group, j, n, x.v, run.value_ld);
  each_visible(tile, n, [&](int64_t r, int64_t count, int64_t tokens) {
    for (int64_t part = 0; part < parts; ++part) {
      const float *values = direct ? (const float *)at(*run.value, tile.b, run.absorbed ? part : tile.group, j) : x.v;
      gemm(count, dim, tokens, x.s + r, 1, ld, values, direct ? run.value->stride[2] : run.value_ld, PANEL,
           x.acc + r * run.value_ld + part * dim, run.value_ld, true, &upcoming);
    }
  });
}

static void block_tile(Tile &tile, TileScratch &x) {
  const Run &run = tile.run;
  const int64_t padded = round_up(tile.rows, LANES), ld = round_up(tile.rows, PANEL) + 16;
  const bool masked = !run.segment && tile.p.mask.data;
  tile.row_lo = x.row_lo;
  tile.row_hi = x.row_hi;
  pack_panels_transposed(x.panels, x.q, run.key_ld, run.key_width, tile.rows);
  load_states(tile, x);
  for (int64_t j = tile.begin; j < tile.end; j += BLOCK) {
    int64_t n = least(BLOCK, tile.end - j);
    if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) continue;
    const int64_t next = least(BLOCK, tile.end - j - BLOCK);
    Upcoming keys = upcoming_tokens(run, *run.key, run.key_dim, tile.b, tile.group, j + BLOCK, next);
    Upcoming values = upcoming_tokens(run, *run.value, run.value_dim, tile.b, tile.group, j + BLOCK, next);
    score_block(tile, j, n, x, ld, keys);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t r = tile.rows; r < padded; ++r) x.s[t * ld + r] = 0.0f;
    adjust_columns(tile, n, x.s, ld, run.absorbed ? x.row_bias : nullptr, masked ? x.mask : nullptr, nullptr);
    if (softmax_columns(tile, x.s, ld, n, padded, x))
      for (int64_t r = 0; r < tile.rows; ++r)
        if (x.factor[r] != 1.0f)
          for (int64_t d = 0; d < run.value_ld; d += LANES)
            store(x.acc + r * run.value_ld + d, load(x.acc + r * run.value_ld + d) * x.factor[r]);
    weigh_block(tile, j, n, x, ld, values);
  }
  keep_states(tile, x);
}
#else
// With 16 registers a panel of rows is as wide as a register tile, so that a panel's queries, scores and sums stay in
// the first-level cache while the block's tokens, the broadcast side of both products, pass by from the second. Sums
// are columns, [panel][value_ld][PANEL].

// Column softmax of a panel's s[tokens][ld] from row r on; raises its sums to the new maxima.
static void softmax_panel(const Run &run, float *s, int64_t ld, int64_t tokens, int64_t r, int64_t rows, float *columns,
                          TileScratch &x) {
  for (int64_t i = 0; i < rows; i += LANES) {
    const Raise raise = raise_max(s + i, ld, tokens, load(x.row_max + r + i));
    V total = load(x.row_sum + r + i) * raise.factor;
    for (int64_t t = 0; t < tokens; ++t) {
      const V weight = exp_of_difference(raise.base, load(s + t * ld + i));
      store(s + t * ld + i, weight);
      total += weight;
    }
    store(x.row_max + r + i, raise.largest);
    store(x.row_sum + r + i, total);
    if (!rescales(raise.factor)) continue;
    for (int64_t d = 0; d < run.value_width; ++d)
      store(columns + d * PANEL + i, load(columns + d * PANEL + i) * raise.factor);
  }
}

// Tokens j .. j + n against all rows. `mask` is null where there is none.
static void attend_block(const Tile &tile, int64_t j, int64_t n, const float *mask, TileScratch &x, Upcoming &keys,
                         Upcoming &values) {
  const Run &run = tile.run;
  const bool fused = only_limits(tile, mask);
  const bool key_direct = run.key->dtype == C2C_F32 && !run.key_scale;
  const bool value_direct = run.value->dtype == C2C_F32 && !run.value_scale;
  const int64_t ld = fused ? PANEL : round_up(tile.rows, PANEL) + 16;
  const float *key = key_direct ? (const float *)at(*run.key, tile.b, tile.group, j) : x.k;
  const int64_t key_stride = key_direct ? run.key->stride[2] : run.key_ld;
  if (!fused) {
    score_block(tile, j, n, x, ld, keys);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t r = tile.rows; r < round_up(tile.rows, PANEL); ++r) x.s[t * ld + r] = 0.0f;
    adjust_columns(tile, n, x.s, ld, run.absorbed ? x.row_bias : nullptr, mask, nullptr);
  } else if (!key_direct) {
    widen_tokens(run, *run.key, run.key_scale, run.key_dim, tile.b, tile.group, j, n, x.k, run.key_ld);
  }
  if (!value_direct)
    widen_tokens(run, *run.value, run.value_scale, run.value_dim, tile.b, tile.group, j, n, x.v, run.value_ld);
  const int64_t parts = value_direct ? run.parts : 1, dim = run.value_width / parts;
  for (int64_t r = 0; r < tile.rows; r += PANEL) {
    const int64_t rows = least<int64_t>(PANEL, round_up(tile.rows - r, LANES)), tokens = tile.visible(r, n);
    if (!tokens) continue;
    float *const s = fused ? x.s : x.s + r, *const columns = x.columns + r * run.value_ld;
    if (fused) {
      gemm(tokens, rows, run.key_width, key, key_stride, 1, x.panels + r * run.key_width, PANEL, 0, s, ld, false,
           &keys);
      if (tile.limited) limit_panel(tile, r, tokens, s, ld);
    }
    softmax_panel(run, s, ld, tokens, r, rows, columns, x);
    for (int64_t part = 0; part < parts; ++part) {
      const float *value =
          value_direct ? (const float *)at(*run.value, tile.b, run.absorbed ? part : tile.group, j) : x.v;
      gemm(dim, rows, tokens, value, 1, value_direct ? run.value->stride[2] : run.value_ld, s, ld, 0,
           columns + part * dim * PANEL, PANEL, true, &values);
    }
  }
}

static void block_tile(Tile &tile, TileScratch &x) {
  const Run &run = tile.run;
  const bool masked = !run.segment && tile.p.mask.data;
  tile.row_lo = x.row_lo;
  tile.row_hi = x.row_hi;
  pack_panels_transposed(x.panels, x.q, run.key_ld, run.key_width, tile.rows);
  load_states(tile, x);
  for (int64_t r = 0; r < tile.rows; r += LANES) {
    float *const columns = x.columns + r / PANEL * PANEL * run.value_ld + r % PANEL;
    transpose_rows(x.acc + r * run.value_ld, run.value_ld, least<int64_t>(LANES, tile.rows - r), run.value_ld, columns,
                   PANEL);
  }
  for (int64_t j = tile.begin; j < tile.end; j += BLOCK) {
    const int64_t n = least(BLOCK, tile.end - j), next = least(BLOCK, tile.end - j - BLOCK);
    if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) continue;
    Upcoming keys = upcoming_tokens(run, *run.key, run.key_dim, tile.b, tile.group, j + BLOCK, next);
    Upcoming values = upcoming_tokens(run, *run.value, run.value_dim, tile.b, tile.group, j + BLOCK, next);
    attend_block(tile, j, n, masked ? x.mask : nullptr, x, keys, values);
  }
  for (int64_t r = 0; r < tile.rows; r += LANES)
    for (int64_t d = 0; d < run.value_ld; d += LANES)
      transpose_rows(x.columns + r / PANEL * PANEL * run.value_ld + r % PANEL + d * PANEL, PANEL, LANES,
                     least<int64_t>(LANES, tile.rows - r), x.acc + r * run.value_ld + d, run.value_ld);
  keep_states(tile, x);
}
#endif
