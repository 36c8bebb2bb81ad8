// What forward and backward attention share: runs of tokens, which queries see which tokens, and one block's masks.
// Included inside an instruction set's namespace.

// Tokens handled between two softmax updates. With 32 registers twice as many: sums are read and written once a block,
// which was a tenth of prefill; with 16 a panel of the block's scores stays in the first-level cache.
constexpr int64_t BLOCK = LANES == 16 ? 128 : 64;
constexpr int64_t LEAST_SPLIT = 128;  // tokens that are worth a thread of their own
constexpr int64_t MANY_ROWS = 32;     // from which on taking up and leaving a tile's sums costs more than some tokens
constexpr int64_t TILED_BLOCK = 256;  // the same where matrix tiles multiply (attention_tiles.h)
constexpr int64_t STAGED_TOKENS = 1024;  // projected between two rounds of attention
constexpr int64_t TARGET_ROWS = 128;     // query rows of a register-blocked tile

static ALWAYS_INLINE float *add_to(float *p, int64_t n) { return p ? p + n : nullptr; }

// Scratch of one thread, carved out of one block of floats.
struct Carver {
  float *next;
  int64_t used = 0;
  float *take(int64_t n) {
    n = round_up(n, 16);
    float *taken = add_to(next, used);
    used += n;
    return taken;
  }
};

// A run as the kernels see it: the own cache or a segment.
struct Run {
  const c2c_tensor *key = nullptr, *value = nullptr;
  const c2c_tensor *key_scale = nullptr, *value_scale = nullptr;  // null: 1
  const c2c_segment *segment = nullptr;                           // null: own cache
  bool absorbed = false;  // raw sharer tokens, read by all query heads at once at their own width
  bool staged = false;    // tokens are projected, or de-quantised and gathered, a few at a time (stage.h)
  int64_t parts = 1;      // a stored token is parts x dim elements (sharer heads side by side where absorbed)
  int64_t key_dim = 0, value_dim = 0;
  int64_t key_width = 0, value_width = 0;  // parts * dim
  int64_t key_ld = 0, value_ld = 0;        // widths padded to a panel
  int64_t len = 0, window = 0;
  bool causal = false, positioned = false;
  int64_t groups = 0, group_heads = 0;  // heads that share a stored token, and how many such groups there are
  int64_t tile_queries = 0, tiles = 0;  // queries per tile; tile rows = group_heads * tile_queries
  int64_t splits = 1;                   // independent parts of the token range, at most
  int64_t first_job = 0;
  float *folded = nullptr;         // absorbed: Wk^T q, [batch][q_heads][q_len][key_ld]
  float *folded_bias = nullptr;    // absorbed: q . bk, [batch][q_heads][q_len]
  SoftmaxState *states = nullptr;  // [batch][q_heads][q_len][splits]
  float *sums = nullptr;           // weighted value sums of these states, [..][value_ld]
};

static void describe_run(Run &run, const c2c_attention_params &p, const c2c_segment *segment) {
  run.segment = segment;
  run.key = segment ? &segment->key : &p.key;
  run.value = segment ? &segment->value : &p.value;
  run.staged = segment && is_staged(*segment);
  if (segment && segment->key_scale.data && !run.staged) run.key_scale = &segment->key_scale;
  if (segment && segment->value_scale.data && !run.staged) run.value_scale = &segment->value_scale;
  run.len = segment ? segment->len : p.len;
  run.positioned = segment && segment->positions.data;
  run.absorbed = segment && segment->key_proj.data && !segment->materialize;
  run.causal = segment ? segment->causal : p.is_causal;
  run.window = segment ? (run.positioned ? p.segment_window : 0) : p.window;
  run.key_dim = run.absorbed ? segment->key_dim : p.head_dim;
  run.value_dim = run.absorbed ? segment->value_dim : p.value_dim;
  run.parts = run.absorbed ? segment->heads : 1;
  run.key_width = run.parts * run.key_dim;
  run.value_width = run.parts * run.value_dim;
  run.key_ld = round_up(run.key_width, PANEL);
  run.value_ld = round_up(run.value_width, PANEL);
  run.groups = run.absorbed ? 1 : p.kv_heads;
  run.group_heads = p.q_heads / run.groups;
  // A wide raw token takes fewer rows, so that a tile's queries and sums stay in the second-level cache.
  int64_t rows = most<int64_t>(16, least<int64_t>(TARGET_ROWS, 48 * 1024 / most(run.key_ld, run.value_ld)));
  run.tile_queries = least(p.q_len, most<int64_t>(1, rows / run.group_heads));
  run.tiles = p.q_len ? div_up(p.q_len, run.tile_queries) : 0;
}

static ALWAYS_INLINE int64_t run_length(const Run &run, const c2c_attention_params &p, int64_t b) {
  const c2c_tensor &lengths = run.segment ? run.segment->lengths : p.lengths;
  return lengths.data ? integer_at(lengths, b * lengths.stride[0]) : run.len;
}

// How many parts a row's tokens are split into. Depends on the row's own length and the heads alone, so that neither
// the batch nor the number of threads changes a result.
static ALWAYS_INLINE int64_t split_count(const Run &run, int64_t length) {
  const int64_t jobs = run.groups * run.tiles, wanted = jobs >= 32 ? 1 : div_up(64, jobs);
  const int64_t shortest = run.group_heads * run.tile_queries < MANY_ROWS ? LEAST_SPLIT : 2 * LEAST_SPLIT;
  return most<int64_t>(1, least(wanted, length / shortest));
}

constexpr int64_t FAR = (int64_t)1 << 62;  // beyond every index and position, and far from overflow

// Tokens that the queries i0 .. i0 + n see: those with lo < coordinate <= hi. The coordinate is a token's index, or
// its position where the segment has positions.
struct Limits {
  int64_t *lo, *hi;  // [queries]
  int64_t lo_least, lo_most, hi_least, hi_most;

  void fill(const Run &run, const c2c_attention_params &p, int64_t b, int64_t i0, int64_t n, int64_t length) {
    lo_least = hi_least = FAR;
    lo_most = hi_most = -FAR;
    for (int64_t i = 0; i < n; ++i) {
      lo[i] = -FAR;
      hi[i] = FAR;
      if (!run.segment || run.positioned) {
        const int64_t at_query = run_query(run, p, b, i0 + i, length);
        if (run.causal) hi[i] = at_query;
        if (run.window > 0) lo[i] = most(-FAR, at_query - least(run.window, FAR));
      }
      if (!run.positioned) hi[i] = least(hi[i], length - 1);
      lo_least = least(lo_least, lo[i]);
      lo_most = most(lo_most, lo[i]);
      hi_least = least(hi_least, hi[i]);
      hi_most = most(hi_most, hi[i]);
    }
  }

  // Own tokens count by index from the lower-right corner; positions of segments meet query_positions.
  static int64_t run_query(const Run &run, const c2c_attention_params &p, int64_t b, int64_t i, int64_t length) {
    if (run.segment && p.query_positions.data)
      return integer_at(p.query_positions, b * p.query_positions.stride[0] + i * p.query_positions.stride[1]);
    int64_t own = !run.segment ? length : p.lengths.data ? integer_at(p.lengths, b * p.lengths.stride[0]) : p.len;
    return own - p.q_len + i;
  }
};

// One tile of query rows (row = head in group * queries + query) against one part of a run.
struct Tile {
  const c2c_attention_params &p;
  const Run &run;
  int64_t b, group, i0, queries;
  int64_t begin, end;  // tokens
  int64_t rows = run.group_heads * queries;
  Limits limits = {};
  int64_t block = BLOCK;          // tokens at a time, at most
  int64_t *coordinate = nullptr;  // [block] of the current block
  int32_t *row_lo = nullptr;      // nullable, [rows, padded]: limits of a limited block without positions,
  int32_t *row_hi = nullptr;      // relative to its first token
  float *gates = nullptr;         // [group_heads][block] of the current block: ln g, or g itself for the backward pass
  bool backward = false;
  bool keep_closed = false;  // the backward pass wants tokens whose gate is 0 too, where the gate has a gradient
  bool gated = false, limited = false;
  int64_t first_token = 0;  // of the current block

  int64_t head(int64_t g) const { return group * run.group_heads + g; }

  // Takes the scratch for limits and blocks, and narrows the token range to what some query can see, where coordinates
  // are indices; keeps blocks aligned.
  void prepare(int64_t *lo, int64_t *hi, int64_t *coordinates, float *gate_block, int64_t length) {
    limits.lo = lo;
    limits.hi = hi;
    coordinate = coordinates;
    gates = gate_block;
    limits.fill(run, p, b, i0, queries, length);
    if (run.positioned) return;
    end = least(end, limits.hi_most + 1);
    int64_t first = limits.lo_least + 1;
    if (first > begin) begin += (first - begin) / BLOCK * BLOCK;
  }

  // Looks at tokens j .. j + n; false where no row sees any of them.
  bool enter_block(int64_t j, int64_t n) {
    first_token = j;
    int64_t first = j, last = j + n - 1;
    if (run.positioned) {
      const c2c_tensor &positions = run.segment->positions;
      first = FAR;
      last = -FAR;
      for (int64_t t = 0; t < n; ++t) {
        int64_t offset = b * positions.stride[0] + (j + t) * positions.stride[1];
        coordinate[t] = integer_at(positions, offset);
        first = least(first, coordinate[t]);
        last = most(last, coordinate[t]);
      }
    }
    if (last <= limits.lo_least || first > limits.hi_most) return false;
    limited = first <= limits.lo_most || last > limits.hi_least;
    for (int64_t t = 0; limited && !run.positioned && t < n; ++t) coordinate[t] = j + t;
    if (limited && row_lo && !run.positioned) limit_rows();
    gated = run.segment && run.segment->gate.data;
    return !gated || load_gates(j, n) || keep_closed;
  }

  void limit_rows() {
    const int64_t padded = round_up(rows, PANEL), longest = block;
    for (int64_t i = 0; i < queries; ++i) {
      row_lo[i] = (int32_t)most<int64_t>(-1, least(longest, limits.lo[i] - first_token));
      row_hi[i] = (int32_t)most<int64_t>(-1, least(longest, limits.hi[i] - first_token));
    }
    for (int64_t r = queries; r < rows; ++r) {
      row_lo[r] = row_lo[r - queries];
      row_hi[r] = row_hi[r - queries];
    }
    for (int64_t r = rows; r < padded; ++r) row_lo[r] = row_hi[r] = -1;
  }

  // Whether row_lo and row_hi hold the limits of the current block.
  bool rows_limited() const { return limited && row_lo && !run.positioned; }

  // How many of the block's n tokens some row of a panel can see; the others need no product.
  int64_t visible(int64_t panel, int64_t n) const {
    if (!rows_limited()) return n;
    VI last = *(const UnalignedVI *)(row_hi + panel), more = *(const UnalignedVI *)(row_hi + panel + LANES);
    last = last > more ? last : more;
    int32_t most_seen = -1;
    for (int l = 0; l < LANES; ++l) most_seen = most<int32_t>(most_seen, last[l]);
    return least<int64_t>(n, most_seen + 1);
  }

  // Gates of the block; false where every one is 0.
  bool load_gates(int64_t j, int64_t n) {
    const c2c_tensor &gate = run.segment->gate;
    bool open = false;
    for (int64_t g = 0; g < run.group_heads; ++g) {
      float *to = gates + g * block;
      if (g > 0 && gate.stride[1] == 0) {
        memcpy(to, gates, block * sizeof(float));
        continue;
      }
      int64_t offset = b * gate.stride[0] + head(g) * gate.stride[1] + j * gate.stride[2];
      for (int64_t t = 0; t < n; ++t) {
        float value = number_at(gate, offset + t * gate.stride[2]);
        open = open || value > 0.0f;
        to[t] = backward ? value : value == 1.0f ? 0.0f : value > 0.0f ? logf(value) : -INF;
      }
    }
    return open;
  }
};

// Attention mask of head h, query i, token j as something to add.
static ALWAYS_INLINE float mask_at(const c2c_tensor &mask, int64_t offset) {
  return mask.dtype == C2C_BOOL ? (((const uint8_t *)mask.data)[offset] ? 0.0f : -INF) : number_at(mask, offset);
}

// The mask of a block with tokens outside and queries inside, [heads or 1][block][queries]; false where it hides
// everything. A mask that is the same for all heads is stored once.
static bool load_mask(const Tile &tile, int64_t j, int64_t n, float *to) {
  const c2c_tensor &mask = tile.p.mask;
  int64_t heads = mask.stride[1] == 0 ? 1 : tile.run.group_heads;
  bool any = false;
  for (int64_t g = 0; g < heads; ++g, to += tile.block * tile.queries)
    for (int64_t i = 0; i < tile.queries; ++i) {
      int64_t offset =
          tile.b * mask.stride[0] + tile.head(g) * mask.stride[1] + (tile.i0 + i) * mask.stride[2] + j * mask.stride[3];
      for (int64_t t = 0; t < n; ++t) {
        float value = mask_at(mask, offset + t * mask.stride[3]);
        any = any || value != -INF;
        to[t * tile.queries + i] = value;
      }
    }
  return any;
}

// Scores of the leading tokens, s[tokens][ld], of a panel of rows that see different ones of them.
static void limit_panel(const Tile &tile, int64_t panel, int64_t tokens, float *s, int64_t ld) {
  for (int64_t r = panel; r < least(panel + PANEL, tile.rows); r += LANES) {
    const VI lo = *(const UnalignedVI *)(tile.row_lo + r), hi = *(const UnalignedVI *)(tile.row_hi + r);
    for (int64_t t = 0; t < tokens; ++t) {
      const VI token = VI{} + (int32_t)t;
      float *column = s + t * ld + r - panel;
      store(column, select((token > lo) & (token <= hi), load(column), set1(-INF)));
    }
  }
}

// Scores of a block of which rows see different tokens. Those that no row of a panel sees are left as they are.
static void limit_columns(const Tile &tile, int64_t n, float *s, int64_t ld) {
  for (int64_t panel = 0; panel < tile.rows; panel += PANEL)
    limit_panel(tile, panel, tile.visible(panel, n), s + panel, ld);
}

// Scores of a block with tokens outside and rows inside, s[block][ld]: bias of absorbed rows, soft cap, gates, mask,
// limits. `cap_slope` (nullable, same shape) receives the derivative of the cap; the backward pass wants weights
// without gates.
static void adjust_columns(const Tile &tile, int64_t n, float *s, int64_t ld, const float *row_bias, const float *mask,
                           float *cap_slope) {
  const int64_t queries = tile.queries;
  const float cap = tile.p.softcap;
  const bool mask_shared = mask && tile.p.mask.stride[1] == 0;
  const bool by_rows = tile.rows_limited();
  const bool plain = !mask && (by_rows || !tile.limited) && (!tile.gated || tile.backward);
  const bool untouched = plain && !row_bias && !(cap > 0.0f);
  for (int64_t t = 0; !untouched && t < n; ++t) {
    float *column = s + t * ld;
    if (row_bias)
      for (int64_t r = 0; r < tile.rows; ++r) column[r] += row_bias[r];
    if (cap > 0.0f)
      for (int64_t r = 0; r < tile.rows; r += LANES) {
        V bent = vtanh(load(column + r) * (1.0f / cap));
        store(column + r, bent * cap);
        if (cap_slope) store(cap_slope + t * ld + r, 1.0f - bent * bent);
      }
    if (plain) continue;
    const int64_t x = tile.coordinate[t];
    for (int64_t g = 0; g < tile.run.group_heads; ++g) {
      float *part = column + g * queries;
      if (tile.gated && !tile.backward) {
        const float gate = tile.gates[g * tile.block + t];
        for (int64_t i = 0; i < queries; ++i) part[i] += gate;
      }
      if (mask) {
        const float *add = mask + ((mask_shared ? 0 : g * tile.block) + t) * queries;
        if (tile.p.mask.dtype == C2C_BOOL)
          for (int64_t i = 0; i < queries; ++i) part[i] = add[i] == 0.0f ? part[i] : -INF;
        else
          for (int64_t i = 0; i < queries; ++i) part[i] += add[i];
      }
      if (tile.limited && !by_rows)
        for (int64_t i = 0; i < queries; ++i)
          part[i] = (x > tile.limits.lo[i]) & (x <= tile.limits.hi[i]) ? part[i] : -INF;
    }
  }
  if (by_rows) limit_columns(tile, n, s, ld);
}

// Scale of one token of one stored head.
static ALWAYS_INLINE float scale_at(const c2c_tensor &scale, int64_t b, int64_t head, int64_t token) {
  return number_at(scale, b * scale.stride[0] + head * scale.stride[1] + token * scale.stride[2]);
}

// Tokens j .. j + n of a run in float32, one row of `width` after another, scaled where there are scales.
static void widen_tokens(const Run &run, const c2c_tensor &t, const c2c_tensor *scale, int64_t dim, int64_t b,
                         int64_t group, int64_t j, int64_t n, float *to, int64_t ld) {
  with_type(t.dtype, t.data, [&](auto *typed) {
    for (int64_t part = 0; part < run.parts; ++part) {
      const int64_t head = run.absorbed ? part : group;
      const auto *from = typed + b * t.stride[0] + head * t.stride[1] + j * t.stride[2];
      float *row = to + part * dim;
      for (int64_t token = 0; token < n; ++token, from += t.stride[2], row += ld) {
        widen(row, from, dim);
        if (!scale) continue;
        const float factor = scale_at(*scale, b, head, j + token);
        for (int64_t d = 0; d < dim; ++d) row[d] *= factor;
      }
    }
  });
}

// The tokens that widen_tokens will be asked for next, where they lie side by side.
static Upcoming upcoming_tokens(const Run &run, const c2c_tensor &t, int64_t dim, int64_t b, int64_t group, int64_t j,
                                int64_t n) {
  if (n <= 0 || t.stride[2] != dim) return Upcoming{};
  const int64_t size = dtype_size(t.dtype);
  return {(const char *)at(t, b, run.absorbed ? 0 : group, j), t.stride[1] * size, n * dim * size, run.parts};
}

// Query rows of a tile in float32 times `scale`, [rows][ld]; padding is zero.
static void load_queries(const Tile &tile, float *to, int64_t ld, float scale) {
  const c2c_attention_params &p = tile.p;
  for (int64_t g = 0; g < tile.run.group_heads; ++g)
    for (int64_t i = 0; i < tile.queries; ++i, to += ld) {
      widen_row(to, p.query.dtype, at(p.query, tile.b, tile.head(g), tile.i0 + i), p.head_dim);
      for (int64_t d = 0; d < p.head_dim; ++d) to[d] *= scale;
      for (int64_t d = p.head_dim; d < ld; ++d) to[d] = 0.0f;
    }
}
