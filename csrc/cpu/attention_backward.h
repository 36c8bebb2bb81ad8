// Merged attention, backward, for runs in receiver space. Included inside an instruction set's namespace.
//
// A job is one run, one KV head and one part of its tokens, against all query rows of that head: it owns the
// gradients of its tokens and leaves a partial gradient of the queries, which a last phase adds up in a fixed order.
// Weights are recomputed tile by tile from lse, or, where float32 cannot hold it, from max and sum that a first phase
// finds (normaliser.h); no score matrix exists beyond BLOCK x tile rows.

struct BackwardRun {
  Run run;
  float *grad_key, *grad_value, *grad_gate;
  int64_t splits, first_job;
  float *grad_query;  // [splits][batch][q_heads][q_len][head_dim], partial
};

struct Backward {
  const c2c_attention_backward_params &params;
  const c2c_attention_params &p;
  BackwardRun *runs;
  int64_t run_count, job_count, scratch;
  float *base, *rest;  // [batch][q_heads][q_len]: a weight is exp((score - base) - rest)
};

struct BackwardScratch {
  float *q, *q_columns, *q_panels, *go, *go_columns, *go_panels, *k, *k_panels, *v, *s, *dp, *slope, *mask, *gates;
  float *row_base, *row_rest, *row_delta, *grad_q;
  int64_t *lo, *hi, *coordinate;
  bf16 *key_tiles, *value_tiles, *turned_keys, *weight_tiles;  // attention_backward_tiles.h

  BackwardScratch(Carver &carver, const Run &run, const c2c_attention_params &p) {
    const int64_t rows = round_up(run.group_heads * run.tile_queries, PANEL), ld = rows + 16;
    q = carver.take(rows * run.key_ld);
    q_columns = carver.take(rows * run.key_ld);
    q_panels = carver.take(rows * run.key_ld);
    go = carver.take(rows * run.value_ld);
    go_columns = carver.take(rows * run.value_ld);
    go_panels = carver.take(rows * run.value_ld);
    k = carver.take(BLOCK * run.key_ld);
    k_panels = carver.take(BLOCK * run.key_ld);
    v = carver.take(BLOCK * run.value_ld);
    s = carver.take(BLOCK * ld);
    dp = carver.take(BLOCK * ld);
    slope = carver.take(p.softcap > 0.0f ? BLOCK * ld : 0);
    mask = carver.take(!run.segment && p.mask.data ? BLOCK * rows : 0);
    gates = carver.take(BLOCK * run.group_heads);
    row_base = carver.take(rows);
    row_rest = carver.take(rows);
    row_delta = carver.take(rows);
    grad_q = carver.take(rows * run.key_ld);
    lo = (int64_t *)carver.take(2 * rows);
    hi = (int64_t *)carver.take(2 * rows);
    coordinate = (int64_t *)carver.take(2 * BLOCK);
    const int64_t tiled = MATRIX_TILES && p.query.dtype == C2C_BF16 ? BLOCK : 0;
    key_tiles = (bf16 *)carver.take(tiled * run.key_ld / 2);
    value_tiles = (bf16 *)carver.take(tiled * run.value_ld / 2);
    turned_keys = (bf16 *)carver.take(tiled * run.key_ld / 2);
    weight_tiles = (bf16 *)carver.take(tiled * rows / 2);
  }
};

// Parts of a row's tokens that are differentiated independently: a function of heads and the row's own length alone.
static int64_t backward_splits(const Run &run, int64_t length) {
  return most<int64_t>(1, least(div_up(8, run.groups), length / (2 * LEAST_SPLIT)));
}

// base and rest of one tile of query rows, and what their sinks hold.
static void normalise(const Backward &backward, int64_t unit, float *scratch) {
  const c2c_attention_params &p = backward.p;
  const Run &own = backward.runs[0].run;  // every run has the same tiles
  const int64_t group = unit / own.tiles % own.groups, b = unit / own.tiles / own.groups;
  const int64_t i0 = unit % own.tiles * own.tile_queries, queries = least(own.tile_queries, p.q_len - i0);
  const Tile tile{p, own, b, group, i0, queries, 0, 0};
  auto place = [&](int64_t r) { return (b * p.q_heads + tile.head(r / queries)) * p.q_len + i0 + r % queries; };
  bool far = false;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t h = tile.head(r / queries), i = i0 + r % queries;
    const float lse = number_at(p.lse, b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2]);
    backward.base[place(r)] = lse == -INF ? INF : lse;  // a row that saw nothing has no gradient
    backward.rest[place(r)] = 0.0f;
    far = far || is_far(lse);
  }
  if (far) {
    Carver carver{scratch};
    NormaliserScratch x(carver, own, p);
    load_queries(tile, x.q, own.key_ld, p.scale);
    pack_panels_transposed(x.q_columns, x.q, own.key_ld, own.key_width, tile.rows);
    for (int64_t r = 0; r < round_up(tile.rows, LANES); ++r) x.max[r] = -INF, x.sum[r] = 0.0f;
    for (int64_t r = 0; p.sinks.data && r < tile.rows; ++r) {
      x.max[r] = number_at(p.sinks, tile.head(r / queries) * p.sinks.stride[0]);
      x.sum[r] = x.max[r] == -INF ? 0.0f : 1.0f;
    }
    for (int64_t which = 0; which < backward.run_count; ++which)
      add_run(p, backward.runs[which].run, b, group, i0, queries, x);
    for (int64_t r = 0; r < tile.rows; ++r)
      if (is_far(backward.base[place(r)])) {
        backward.base[place(r)] = x.max[r];
        backward.rest[place(r)] = logf(x.sum[r]);
      }
  }
  for (int64_t r = 0; backward.params.sink_weight && r < tile.rows; ++r) {
    const float sink = number_at(p.sinks, tile.head(r / queries) * p.sinks.stride[0]);
    backward.params.sink_weight[place(r)] = exp1((sink - backward.base[place(r)]) - backward.rest[place(r)]);
  }
}

// Whether some row of a tile takes its weights from the first phase, whose scores are sums of float32 products.
static bool has_far_rows(const Tile &tile) {
  const c2c_tensor &lse = tile.p.lse;
  bool far = false;
  for (int64_t r = 0; r < tile.rows; ++r)
    far = far || is_far(number_at(lse, tile.b * lse.stride[0] + tile.head(r / tile.queries) * lse.stride[1] +
                                           (tile.i0 + r % tile.queries) * lse.stride[2]));
  return far;
}

// Gradient of the gate 0 of one token and head from scores without gates: what a weight would add, bounded where its
// score is far above all others.
static float closed_gate_gradient(const float *s, const float *dp, const BackwardScratch &x, int64_t first, int64_t n) {
  const float *base = x.row_base + first, *rest = x.row_rest + first, *delta = x.row_delta + first;
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) total += exp1(least((s[i] - base[i]) - rest[i], 80.0f)) * (dp[i] - delta[i]);
  return total;
}

// From scores without gates s[n][ld] and dp[n][ld]: s becomes the weights, dp the gradients of q . k; adds to the
// gates' gradients. A gate joins the exponent, as in the forward pass: no weight exceeds 1.
static void weigh_gradients(const Tile &tile, int64_t n, int64_t ld, BackwardScratch &x, float *grad_gate) {
  const int64_t padded = round_up(tile.rows, LANES), queries = tile.queries;
  for (int64_t t = 0; t < n; ++t) {
    float *s = x.s + t * ld, *dp = x.dp + t * ld;
    for (int64_t g = 0; tile.gated && g < tile.run.group_heads; ++g) {
      const float gate = x.gates[g * BLOCK + t];
      float *part = s + g * queries;
      if (gate == 0.0f && grad_gate)
        grad_gate[g * tile.run.len + t] += closed_gate_gradient(part, dp + g * queries, x, g * queries, queries);
      const float log_gate = gate > 0.0f ? logf(gate) : -INF;
      for (int64_t i = 0; i < queries; ++i) part[i] = gate > 0.0f ? part[i] + log_gate : -INF;
    }
    for (int64_t r = 0; r < padded; r += LANES) {
      V weight = vexp((load(s + r) - load(x.row_base + r)) - load(x.row_rest + r));
      store(s + r, weight);
      store(dp + r, weight * (load(dp + r) - load(x.row_delta + r)));
    }
    for (int64_t g = 0; tile.gated && grad_gate && g < tile.run.group_heads; ++g) {
      const float gate = x.gates[g * BLOCK + t];
      if (!(gate > 0.0f)) continue;
      float total = 0.0f;
      for (int64_t i = 0; i < queries; ++i) total += dp[g * queries + i];
      grad_gate[g * tile.run.len + t] += total / gate;
    }
    if (tile.p.softcap > 0.0f)
      for (int64_t r = 0; r < padded; r += LANES) store(dp + r, load(dp + r) * load(x.slope + t * ld + r));
  }
}
