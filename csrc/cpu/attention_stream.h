// Attention of few query rows: a block of tokens at a time, scores s[row][token]. Included inside an instruction set's
// namespace.
//
// Up to STREAM_ROWS rows a token goes through registers once (rows.h). Beyond, as far as rows fill no more than one
// vector, tokens are the vectors: keys are transposed into panels, 64 shuffles for 16 x 16 of them, and multiplied by
// broadcast queries, 10 loads for 24 multiply-adds; rows as the vectors would take a load for every multiply-add.

constexpr int64_t STREAM_ROWS = 12;
constexpr int64_t FEW_ROWS = STREAM_ROWS > LANES ? STREAM_ROWS : LANES;
constexpr int64_t WIDENED_TOKENS = 2 * TILE_ROWS;  // whose keys are in float32 at a time, for many rows

struct TileScratch {
  float *q, *panels, *s, *scaled, *scales, *acc, *k, *v, *mask, *gates, *row_bias, *row_max, *row_sum, *factor;
  int64_t *lo, *hi, *coordinate;
  int32_t *row_lo, *row_hi;
  SoftmaxState *state;
  bf16 *key_tiles, *value_tiles, *weight_tiles;  // of a block and of a panel's rows (attention_tiles.h)
  float *columns;                                // sums, turned: [value_ld][rows], or in panels (attention_block.h)

  TileScratch(Carver &carver, const Run &run, const c2c_attention_params &p) {
    const int64_t rows = round_up(run.group_heads * run.tile_queries, PANEL);
    const int64_t tiled = MATRIX_TILES && p.query.dtype == C2C_BF16 ? TILED_BLOCK : 0, block = most(BLOCK, tiled);
    q = carver.take(rows * run.key_ld);
    panels = carver.take(rows * run.key_ld * 3 / 2);  // as panels of floats, or as three terms of bfloat16
    s = carver.take(block * (rows + 16));
    scaled = carver.take(run.key_scale || run.value_scale ? BLOCK * FEW_ROWS : 0);
    scales = carver.take(BLOCK);
    acc = carver.take(rows * run.value_ld);
    const int64_t widened = run.absorbed || LANES == 16 ? WIDENED_TOKENS : BLOCK;
    k = carver.take(most(widened * run.key_ld, (BLOCK + LANES) * round_up(run.key_dim, PANEL)));
    v = carver.take(BLOCK * run.value_ld);
    mask = carver.take(!run.segment && p.mask.data ? block * rows : 0);
    gates = carver.take(block * run.group_heads);
    row_bias = carver.take(rows);
    row_max = carver.take(rows);
    row_sum = carver.take(rows);
    factor = carver.take(rows);
    lo = (int64_t *)carver.take(2 * rows);
    hi = (int64_t *)carver.take(2 * rows);
    coordinate = (int64_t *)carver.take(2 * block);
    row_lo = (int32_t *)carver.take(rows);
    row_hi = (int32_t *)carver.take(rows);
    state = (SoftmaxState *)carver.take(2 * rows);
    key_tiles = (bf16 *)carver.take(tiled * run.key_ld / 2);
    value_tiles = (bf16 *)carver.take(tiled * run.value_ld / 2);
    weight_tiles = (bf16 *)carver.take(tiled * PANEL / 2);
    columns = carver.take(tiled || LANES != 16 ? rows * run.value_ld : 0);
  }
};

static int64_t attention_scratch(const Run &run, const c2c_attention_params &p) {
  Carver carver{nullptr};
  TileScratch sized(carver, run, p);
  return carver.used;
}

// Whether adjust_row has anything to do in the block that has been entered.
static bool adjusts(const Tile &tile) {
  return tile.run.absorbed || tile.p.softcap > 0.0f || tile.gated || tile.limited ||
         (!tile.run.segment && tile.p.mask.data);
}

// Bias, cap, gates, mask and limits of one row of scores, s[n].
static void adjust_row(const Tile &tile, int64_t j, int64_t n, int64_t g, int64_t i, float *s, float row_bias) {
  const c2c_attention_params &p = tile.p;
  if (tile.run.absorbed)
    for (int64_t t = 0; t < n; ++t) s[t] += row_bias;
  for (int64_t t = 0; p.softcap > 0.0f && t < n; t += LANES)
    store(s + t, vtanh(load(s + t) * (1.0f / p.softcap)) * p.softcap);
  if (tile.gated)
    for (int64_t t = 0; t < n; ++t) s[t] += tile.gates[g * tile.block + t];
  if (!tile.run.segment && p.mask.data) {
    const c2c_tensor &mask = p.mask;
    int64_t offset =
        tile.b * mask.stride[0] + tile.head(g) * mask.stride[1] + (tile.i0 + i) * mask.stride[2] + j * mask.stride[3];
    for (int64_t t = 0; t < n; ++t) {
      const float add = mask_at(mask, offset + t * mask.stride[3]);
      s[t] = mask.dtype == C2C_BOOL && add != 0.0f ? -INF : s[t] + add;
    }
  }
  if (tile.limited) {
    const int64_t lo = tile.limits.lo[i], hi = tile.limits.hi[i];
    for (int64_t t = 0; t < n; ++t) s[t] = (tile.coordinate[t] > lo) & (tile.coordinate[t] <= hi) ? s[t] : -INF;
  }
}

// Scores of n tokens times `scale` become weights relative to their state's new maximum, zeros up to a whole vector
// behind them; returns the factor for the row's sums so far.
static float softmax_row(float *s, int64_t n, float scale, SoftmaxState &state) {
  const int64_t padded = round_up(n, LANES), whole = n / LANES * LANES;
  for (int64_t t = whole; t < n; ++t) s[t] *= scale;  // of any sign: what pads the last vector is not multiplied
  for (int64_t t = n; t < padded; ++t) s[t] = -INF;
  auto score = [&](int64_t t) __attribute__((always_inline)) {
    V x = load(s + t) * (t < whole ? scale : 1.0f);
    keep_in_register(x);  // rounded as the maximum is: a fused difference may be half an ulp of the score above 0
    return x;
  };
  V largest = set1(-INF);
  VI broken = {};
  for (int64_t t = 0; t < padded; t += LANES) {
    const V x = score(t);
    largest = vmax(x, largest);
    broken |= x != x;
  }
  float factor = state.update(any(broken) ? __builtin_nanf("") : largest_of(largest));
  const V base = set1(state.max == -INF ? 0.0f : state.max);
  V total = {};
  for (int64_t t = 0; t < padded; t += LANES) {
    V weight = vexp(score(t) - base);
    store(s + t, weight);
    total += weight;
  }
  state.sum += sum(total);
  return factor;
}

// Scores s[row][BLOCK] of tokens j .. j + n, to be multiplied by `scale`, become weights; raises the rows' sums to the
// new maxima.
static void weights_of_block(const Tile &tile, int64_t j, int64_t n, float scale, float *s, TileScratch &x) {
  const bool adjusted = adjusts(tile);
  for (int64_t r = 0; r < tile.rows; ++r, s += BLOCK) {
    if (adjusted) {
      for (int64_t t = 0; scale != 1.0f && t < n; t += LANES) store(s + t, load(s + t) * scale);
      adjust_row(tile, j, n, r / tile.queries, r % tile.queries, s, x.row_bias[r]);
    }
    const float factor = softmax_row(s, n, adjusted ? 1.0f : scale, x.state[r]);
    float *const acc = x.acc + r * tile.run.value_ld;
    for (int64_t d = 0; factor != 1.0f && d < tile.run.value_ld; ++d) acc[d] *= factor;
  }
}

struct Tokens {
  int64_t j, n;  // from the j-th one on, so many; 0: none
};

// Whether a block's products come before the values of the block before it are weighed: its softmax, a chain of
// dependent steps, then has them to go on beside. With 16 registers, whose loops ask for tokens of both in an order of
// their own (rows_beside.h), it costs 5 % of the rate from memory.
constexpr bool PRODUCTS_AHEAD = LANES == 16;

// All blocks of a tile that some row sees: dot(block, before, s) finds scores s[row][BLOCK], to be multiplied by
// `scale`; weigh(block, after, weights) adds weighted values. `before` is the block that is weighed next, `after` the
// first token whose product comes next.
template <class Dot, class Weigh>
static ALWAYS_INLINE void stream_blocks(Tile &tile, float scale, TileScratch &x, Dot dot, Weigh weigh) {
  auto enter = [&](int64_t j) {
    for (; j < tile.end; j += tile.block) {
      const int64_t n = least(tile.block, tile.end - j);
      if (tile.enter_block(j, n)) return Tokens{j, n};
    }
    return Tokens{tile.end, 0};
  };
  float *scores = x.s, *others = x.s + tile.rows * BLOCK;
  Tokens block = enter(tile.begin);
  if (PRODUCTS_AHEAD && block.n) dot(block, block, scores);
  while (block.n) {
    if (!PRODUCTS_AHEAD) dot(block, block, scores);
    weights_of_block(tile, block.j, block.n, scale, scores, x);
    const Tokens next = enter(block.j + tile.block);
    if (PRODUCTS_AHEAD && next.n) dot(next, block, others);
    weigh(block, next.j + (PRODUCTS_AHEAD ? next.n : 0), scores);
    float *const weighed = scores;
    scores = others, others = weighed;
    block = next;
  }
}

static void load_scales(const c2c_tensor &scale, int64_t b, int64_t head, int64_t j, int64_t n, float *to) {
  for (int64_t t = 0; t < n; ++t) to[t] = scale_at(scale, b, head, j + t);
}

// Panels of n tokens with tokens side by side, [n / PANEL][dim][PANEL] in float32.
static void pack_across(float *panels, float *widened, int32_t dtype, const void *tokens, int64_t stride, int64_t n,
                        int64_t dim) {
  const int64_t size = dtype_size(dtype);
  for (int64_t t = 0; t < n; t += LANES) {
    const int64_t count = least<int64_t>(LANES, n - t);
    const char *from = (const char *)tokens + t * stride * size;
    float *to = panels + t / PANEL * PANEL * dim + t % PANEL;
    if (dtype == C2C_F32) {
      transpose_rows((const float *)from, stride, count, dim, to, PANEL);
    } else if (dtype == C2C_BF16 && dim % PANEL == 0) {
      transpose_pairs((const bf16 *)from, stride, count, dim, to, PANEL);
    } else {
      for (int64_t i = 0; i < count; ++i) widen_row(widened + i * dim, dtype, from + i * stride * size, dim);
      transpose_rows(widened, dim, count, dim, to, PANEL);
    }
  }
}

// What dot_tokens and weigh_tokens do, for more than STREAM_ROWS rows; `upcoming` is what is read afterwards.
static void dot_across(const Tile &tile, int64_t head, int64_t j, int64_t n, const float *q, float *s, bool add,
                       TileScratch &x, Upcoming &upcoming) {
  const Run &run = tile.run;
  float *const panels = x.k, *const widened = x.k + BLOCK * round_up(run.key_dim, PANEL);
  pack_across(panels, widened, run.key->dtype, at(*run.key, tile.b, head, j), run.key->stride[2], n, run.key_dim);
  gemm(tile.rows, n, run.key_dim, q, run.key_ld, 1, panels, PANEL, run.key_dim * PANEL, s, BLOCK, add, &upcoming);
}

static void weigh_across(const Tile &tile, int64_t head, int64_t j, int64_t n, const float *weights, float *acc,
                         TileScratch &x, Upcoming &upcoming) {
  const Run &run = tile.run;
  const c2c_tensor &t = *run.value;
  const float *values = (const float *)at(t, tile.b, head, j);
  int64_t ld = t.stride[2];
  if (t.dtype != C2C_F32 || run.value_dim % LANES != 0) {
    ld = round_up(run.value_dim, PANEL);
    for (int64_t i = 0; i < n; ++i) widen_row(x.v + i * ld, t.dtype, at(t, tile.b, head, j + i), run.value_dim);
    values = x.v;
  }
  gemm(tile.rows, run.value_dim, n, weights, BLOCK, 1, values, ld, PANEL, acc, run.value_ld, true, &upcoming);
}

// Whether up to STREAM_ROWS rows are multiplied by a run's tokens as pairs of bfloat16 (rows_pairs.h).
static bool reads_pairs(const Run &run, const c2c_attention_params &p, int64_t rows) {
  if (!MATRIX_TILES || rows > STREAM_ROWS || run.absorbed || run.key_scale || run.value_scale) return false;
  if (p.query.dtype != C2C_BF16 || run.key->dtype != C2C_BF16 || run.value->dtype != C2C_BF16) return false;
  return run.key_dim % PANEL == 0 && run.value_dim % PANEL == 0;
}

#if defined(C2C_MATRIX_TILES)
// stream_tile for such runs, whose queries have been loaded unscaled.
static void stream_pairs(Tile &tile, TileScratch &x) {
  const Run &run = tile.run;
  const bf16 *keys = (const bf16 *)at(*run.key, tile.b, tile.group);
  const bf16 *values = (const bf16 *)at(*run.value, tile.b, tile.group);
  const int64_t key_stride = run.key->stride[2], value_stride = run.value->stride[2];
  bf16 *const q = (bf16 *)x.panels, *const packed = x.weight_tiles;
  narrow(q, x.q, tile.rows * run.key_ld);
  auto dot = [&](Tokens block, Tokens before, float *s) {
    dot_pairs(q, run.key_ld, tile.rows, keys + block.j * key_stride, key_stride, block.n, run.key_dim, s, BLOCK,
              values + before.j * value_stride);
  };
  auto weigh = [&](Tokens block, int64_t after, const float *weights) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t t = 0; t < block.n; t += DEPTH)
        store_packed(packed + r * BLOCK + t, (V)load_32(weights + r * BLOCK + t, DEPTH));
    weigh_pairs(packed, BLOCK, tile.rows, values + block.j * value_stride, value_stride, block.n, run.value_dim, x.acc,
                run.value_ld, keys + after * key_stride);
  };
  stream_blocks(tile, tile.p.scale, x, dot, weigh);
}
#else
static void stream_pairs(Tile &, TileScratch &) {}
#endif

static void stream_tile(Tile &tile, TileScratch &x) {
  const Run &run = tile.run;
  const bool across = tile.rows > STREAM_ROWS;
  const Turn first =
      run.parts == 1 && run.key_dim == run.value_dim && run.key->dtype == run.value->dtype ? Turn::FIRST : Turn::ALONE;
  auto scaled = [&](const c2c_tensor &scale, int64_t head, Tokens block, const float *from, float *to, bool add) {
    load_scales(scale, tile.b, head, block.j, block.n, x.scales);
    for (int64_t r = 0; r < tile.rows * BLOCK; r += BLOCK)
      for (int64_t t = 0; t < block.n; ++t) {
        const float product = from[r + t] * x.scales[t];
        to[r + t] = add ? to[r + t] + product : product;
      }
  };
  auto dot = [&](Tokens block, Tokens before, float *s) {
    Upcoming values_ahead = upcoming_tokens(run, *run.value, run.value_dim, tile.b, tile.group, before.j, before.n);
    for (int64_t part = 0; part < run.parts; ++part) {
      const int64_t head = run.absorbed ? part : tile.group;
      const void *keys = at(*run.key, tile.b, head, block.j);
      const void *next = part + 1 < run.parts ? at(*run.key, tile.b, head + 1, block.j)
                                              : at(*run.value, tile.b, run.absorbed ? 0 : head, before.j);
      const float *q = x.q + part * run.key_dim;
      float *const dots = run.key_scale ? x.scaled : s;
      const bool add = part > 0 && !run.key_scale;
      if (across)
        dot_across(tile, head, block.j, block.n, q, dots, add, x, values_ahead);
      else
        dot_tokens(q, run.key_ld, tile.rows, run.key->dtype, keys, run.key->stride[2], block.n, run.key_dim, dots,
                   BLOCK, add, next, first);
      if (run.key_scale) scaled(*run.key_scale, head, block, dots, s, part > 0);
    }
  };
  auto weigh = [&](Tokens block, int64_t after, const float *weights) {
    Upcoming keys_ahead =
        upcoming_tokens(run, *run.key, run.key_dim, tile.b, tile.group, after, least(tile.block, tile.end - after));
    for (int64_t part = 0; part < run.parts; ++part) {
      const int64_t head = run.absorbed ? part : tile.group;
      const void *values = at(*run.value, tile.b, head, block.j);
      const void *next = part + 1 < run.parts ? at(*run.value, tile.b, head + 1, block.j)
                                              : at(*run.key, tile.b, run.absorbed ? 0 : head, after);
      const float *used = weights;
      if (run.value_scale) {
        scaled(*run.value_scale, head, block, weights, x.scaled, false);
        used = x.scaled;
      }
      float *const acc = x.acc + part * run.value_dim;
      if (across)
        weigh_across(tile, head, block.j, block.n, used, acc, x, keys_ahead);
      else
        weigh_tokens(used, BLOCK, tile.rows, run.value->dtype, values, run.value->stride[2], block.n, run.value_dim,
                     acc, run.value_ld, next, first == Turn::FIRST ? Turn::SECOND : Turn::ALONE);
    }
  };
  stream_blocks(tile, 1.0f, x, dot, weigh);
}
