// The normaliser of rows whose log-sum-exp float32 cannot hold: beside a score of -1e9 nothing is left of ln n. The
// backward pass takes a weight as exp((score - base) - rest): base = lse and rest = 0, but in far rows base is the
// largest score and rest = ln(sum relative to it), both from the scores that the backward pass itself computes.
// Included inside an instruction set's namespace.

// Up to here half an ulp of lse, the relative error of a row's weights, is at most 4e-6.
constexpr float FAR_LSE = 128.0f;

static ALWAYS_INLINE bool is_far(float lse) { return fabsf(lse) > FAR_LSE && fabsf(lse) < INF; }

struct NormaliserScratch {
  float *q, *q_columns, *k, *s, *mask, *gates, *max, *sum;
  int64_t *lo, *hi, *coordinate;

  NormaliserScratch(Carver &carver, const Run &run, const c2c_attention_params &p) {
    const int64_t rows = round_up(run.group_heads * run.tile_queries, PANEL);
    q = carver.take(rows * run.key_ld);
    q_columns = carver.take(rows * run.key_ld);
    k = carver.take(BLOCK * run.key_ld);
    s = carver.take(BLOCK * (rows + 16));
    mask = carver.take(p.mask.data ? BLOCK * rows : 0);
    gates = carver.take(BLOCK * run.group_heads);
    max = carver.take(rows);
    sum = carver.take(rows);
    lo = (int64_t *)carver.take(2 * rows);
    hi = (int64_t *)carver.take(2 * rows);
    coordinate = (int64_t *)carver.take(2 * BLOCK);
  }
};

// Takes scores s[n][ld] into every row's max and sum.
static void update_columns(const float *s, int64_t ld, int64_t n, int64_t rows, float *max, float *sum) {
  for (int64_t r = 0; r < rows; r += LANES) {
    const V old = load(max + r);
    V largest = old;
    for (int64_t t = 0; t < n; ++t) largest = vmax(load(s + t * ld + r), largest);
    const V base = select(largest == set1(-INF), V{}, largest);
    V total = load(sum + r) * vexp(old - base);
    for (int64_t t = 0; t < n; ++t) total += vexp(load(s + t * ld + r) - base);
    store(max + r, largest);
    store(sum + r, total);
  }
}

// Takes all tokens of one run into max and sum of the tile's rows, whose queries are in x.q_columns.
static void add_run(const c2c_attention_params &p, const Run &run, int64_t b, int64_t group, int64_t i0,
                    int64_t queries, NormaliserScratch &x) {
  const int64_t length = run_length(run, p, b);
  const bool masked = !run.segment && p.mask.data;
  Tile tile{p, run, b, group, i0, queries, 0, length};
  tile.prepare(x.lo, x.hi, x.coordinate, x.gates, length);
  const int64_t ld = round_up(tile.rows, PANEL) + 16, padded = round_up(tile.rows, LANES);
  for (int64_t j = tile.begin; j < tile.end; j += BLOCK) {
    const int64_t n = least(BLOCK, tile.end - j);
    if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) continue;
    widen_tokens(run, *run.key, nullptr, run.key_dim, b, group, j, n, x.k, run.key_ld);
    gemm(n, tile.rows, run.key_width, x.k, run.key_ld, 1, x.q_columns, PANEL, run.key_width * PANEL, x.s, ld, false);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t r = tile.rows; r < padded; ++r) x.s[t * ld + r] = 0.0f;
    adjust_columns(tile, n, x.s, ld, nullptr, masked ? x.mask : nullptr, nullptr);
    update_columns(x.s, ld, n, padded, x.max, x.sum);
  }
}
