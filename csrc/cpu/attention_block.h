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
  return {base, select(old == largest, set1(1.0f), vexp(old - base)), largest};
}

// Whether some of LANES rows' sums so far change.
static ALWAYS_INLINE bool rescales(V factor) { return any(factor != set1(1.0f)); }

// Column softmax of s[block][ld] over the tokens that rows see; leaves the factor of every row's sums so far.
static bool softmax_columns(const Tile &tile, float *s, int64_t ld, int64_t block, int64_t rows, TileScratch &x) {
  bool rescale = false;
  for (int64_t r = 0; r < rows; r += LANES) {
    const int64_t n = tile.visible(r / PANEL * PANEL, block);
    const Raise raise = raise_max(s + r, ld, n, load(x.row_max + r));
    V total = load(x.row_sum + r) * raise.factor;
    for (int64_t t = 0; t < n; ++t) {
      V weight = vexp(load(s + t * ld + r) - raise.base);
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

// Maxima and sums of a tile's rows side by side, and back.
static void load_states(const Tile &tile, TileScratch &x) {
  for (int64_t r = 0; r < round_up(tile.rows, LANES); ++r) {
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
