// Merged attention, forward. Included inside an instruction set's namespace.
//
// Three phases over threads: fold (absorbed segments: q~ = Wk^T q), attend (each job is one run, one tile of query
// rows, one part of the tokens, and leaves a softmax state), combine (states of a row merged in a fixed order,
// absorbed sums taken through Wv, result rounded once). Few rows stream the cache (attention_stream.h); more rows go
// through products of blocks (attention_block.h, attention_tiles.h). Segments that are not read as they are stored pass
// through a stage (stage.h) between fold and combine.

constexpr int64_t QUERY_BLOCK = 16;  // queries of one head that are folded or combined together

struct Forward {
  const c2c_attention_params &p;
  Run *runs;
  int64_t run_count, job_count;
  int64_t scratch;  // floats per thread

  // Whether a tile sees all that its rows attend to, so that it can finish them itself.
  bool whole_rows() const {
    return run_count == 1 && runs[0].splits == 1;  // the own cache alone
  }
};

// ---- phases ----

static void load_folded(const Tile &tile, TileScratch &x) {
  const Run &run = tile.run;
  for (int64_t r = 0; r < tile.rows; ++r) {
    int64_t row = (tile.b * tile.p.q_heads + r / tile.queries) * tile.p.q_len + tile.i0 + r % tile.queries;
    memcpy(x.q + r * run.key_ld, run.folded + row * run.key_ld, run.key_ld * sizeof(float));
    x.row_bias[r] = run.folded_bias[row];
  }
}

// q~ = scale * Wk[h']^T q and the bias term scale * q . bk, for a block of queries of one head.
static void fold_queries(const c2c_attention_params &p, const Run &run, int64_t b, int64_t h, int64_t i0, int64_t n,
                         float *scratch) {
  const c2c_segment &segment = *run.segment;
  const int64_t kv_head = h / (p.q_heads / p.kv_heads), ldq = round_up(p.head_dim, PANEL);
  float *q = scratch, *bias_row = q + QUERY_BLOCK * ldq, *inner = bias_row + ldq;
  const int64_t row0 = (b * p.q_heads + h) * p.q_len + i0;
  float *folded = run.folded + row0 * run.key_ld;
  for (int64_t i = 0; i < n; ++i) {
    widen_row(q + i * ldq, p.query.dtype, at(p.query, b, h, i0 + i), p.head_dim);
    for (int64_t d = 0; d < p.head_dim; ++d) q[i * ldq + d] *= p.scale;
  }
  memset(folded, 0, n * run.key_ld * sizeof(float));
  const c2c_tensor &proj = segment.key_proj, &proj_in = segment.key_proj_in;
  const void *weights = at(proj, kv_head);
  if (proj_in.data) {
    const int64_t ld = round_up(segment.key_rank, PANEL);
    memset(inner, 0, n * ld * sizeof(float));
    weigh_tokens(q, ldq, n, proj.dtype, weights, proj.stride[1], p.head_dim, segment.key_rank, inner, ld);
    weigh_tokens(inner, ld, n, proj_in.dtype, proj_in.data, proj_in.stride[0], segment.key_rank, run.key_width, folded,
                 run.key_ld);
  } else {
    weigh_tokens(q, ldq, n, proj.dtype, weights, proj.stride[1], p.head_dim, run.key_width, folded, run.key_ld);
  }
  if (segment.key_bias.data) widen_row(bias_row, segment.key_bias.dtype, at(segment.key_bias, kv_head), p.head_dim);
  for (int64_t i = 0; i < n; ++i) {
    float dot = 0.0f;
    if (segment.key_bias.data)
      for (int64_t d = 0; d < p.head_dim; ++d) dot += q[i * ldq + d] * bias_row[d];
    run.folded_bias[row0 + i] = dot;
  }
}

// The normaliser of a row of head h before any run's state is merged: that of its sink.
static SoftmaxState initial_state(const c2c_attention_params &p, int64_t h) {
  SoftmaxState state;
  if (!p.sinks.data) return state;
  const float sink = number_at(p.sinks, h * p.sinks.stride[0]);
  if (sink != -INF) state.merge(SoftmaxState{sink, 1.0f});
  return state;
}

static ALWAYS_INLINE float *lse_at(const c2c_attention_params &p, int64_t b, int64_t h, int64_t i) {
  return (float *)p.lse.data + b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2];
}

static ALWAYS_INLINE float *mass_at(const c2c_attention_params &p, int64_t b, int64_t h, int64_t i, int64_t which) {
  return (float *)p.mass.data + b * p.mass.stride[0] + h * p.mass.stride[1] + i * p.mass.stride[2] +
         which * p.mass.stride[3];
}

// What `combine` does for rows whose only state is at hand.
static void finish_rows(const c2c_attention_params &p, const Tile &tile, TileScratch &x) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t h = tile.head(r / tile.queries), i = tile.i0 + r % tile.queries;
    const SoftmaxState &state = x.state[r];
    SoftmaxState total = initial_state(p, h);
    total.merge(state);
    const float weight = total.weight(state.max);
    if (p.lse.data) *lse_at(p, tile.b, h, i) = total.finish();
    if (p.mass.data) *mass_at(p, tile.b, h, i, 0) = state.max == -INF ? 0.0f : weight * state.sum;
    float *sums = x.acc + r * tile.run.value_ld;
    for (int64_t d = 0; d < tile.run.value_ld; d += LANES)
      store(sums + d, state.max == -INF ? V{} : load(sums + d) * weight + V{});
    narrow_row(p.out.dtype, const_cast<void *>(at(p.out, tile.b, h, i)), sums, p.value_dim);
  }
}

// Tokens begin .. end of a row's `length` against one tile of query rows. `resume` goes on from the stored state.
// `finish` writes the rows' results instead of their states.
static void attend_part(const c2c_attention_params &p, const Run &run, int64_t b, int64_t group, int64_t tile_index,
                        int64_t split, int64_t begin, int64_t end, int64_t length, bool resume, bool finish,
                        float *scratch) {
  Carver carver{scratch};
  TileScratch x(carver, run, p);
  const int64_t i0 = tile_index * run.tile_queries, queries = least(run.tile_queries, p.q_len - i0);
  Tile tile{p, run, b, group, i0, queries, least(length, begin), least(length, end)};
  tile.prepare(x.lo, x.hi, x.coordinate, x.gates, length);
  const bool empty = tile.begin >= tile.end;
  const bool tiled = tile.rows > (run.absorbed ? STREAM_ROWS : FEW_ROWS) && reads_tiles(run, p);
  const bool streamed = streams_tiles(run, p, tile.rows);
  const bool paired = reads_pairs(run, p, tile.rows);
  if (resume && empty) return;
  auto stored = [&](int64_t r) {
    return ((b * p.q_heads + tile.head(r / queries)) * p.q_len + i0 + r % queries) * run.splits + split;
  };
  for (int64_t r = 0; r < tile.rows; ++r) {
    x.state[r] = resume ? run.states[stored(r)] : SoftmaxState{};
    if (empty) continue;
    float *sums = x.acc + r * run.value_ld;
    if (x.state[r].max != -INF)
      memcpy(sums, run.sums + stored(r) * run.value_ld, run.value_ld * sizeof(float));
    else
      memset(sums, 0, run.value_ld * sizeof(float));
  }
  if (!empty) {
    if (run.absorbed)
      load_folded(tile, x);
    else
      load_queries(tile, x.q, run.key_ld, streamed || tiled || paired ? 1.0f : p.scale);
    if (streamed)
      stream_by_tiles(tile, x);
    else if (paired)
      stream_pairs(tile, x);
    else if (tiled)
      attend_by_tiles(tile, x);
    else if (tile.rows <= FEW_ROWS)
      stream_tile(tile, x);
    else
      block_tile(tile, x);
  }
  if (finish) return finish_rows(p, tile, x);
  for (int64_t r = 0; r < tile.rows; ++r) {
    run.states[stored(r)] = x.state[r];
    if (x.state[r].max != -INF)
      memcpy(run.sums + stored(r) * run.value_ld, x.acc + r * run.value_ld, run.value_ld * sizeof(float));
  }
}

// Part `split` of the tokens from `start` that a run reads at a time, for job = (group, tile, split).
static void attend_split(const c2c_attention_params &p, const Run &run, int64_t b, int64_t job, int64_t start,
                         int64_t length, bool finish, float *scratch) {
  const int64_t split = job % run.splits, tile = job / run.splits % run.tiles, group = job / run.splits / run.tiles;
  const int64_t together = run.staged ? least(length, STAGED_TOKENS) : length;
  const int64_t chunk = round_up(div_up(together, split_count(run, together)), LEAST_SPLIT / 2);
  const int64_t stop = start + together;
  attend_part(p, run, b, group, tile, split, least(stop, start + split * chunk),
              least(stop, start + (split + 1) * chunk), length, start > 0, finish, scratch);
}

static void attend(const Forward &forward, int64_t job, float *scratch) {
  const c2c_attention_params &p = forward.p;
  int64_t which = forward.run_count - 1;
  while (forward.runs[which].staged || job < forward.runs[which].first_job) --which;
  const Run &run = forward.runs[which];
  job -= run.first_job;
  const int64_t jobs = run.groups * run.tiles * run.splits, b = job / jobs;
  attend_split(p, run, b, job % jobs, 0, run_length(run, p, b), forward.whole_rows(), scratch);
}

// sums (+)= the states of one run for one row, weighted; returns the share of the normaliser that the run holds.
static float collect(const Run &run, int64_t row, const SoftmaxState &total, float *sums) {
  float mass = 0.0f;
  for (int64_t split = 0; split < run.splits; ++split) {
    const SoftmaxState &state = run.states[row * run.splits + split];
    const float weight = total.weight(state.max);
    if (state.max == -INF) continue;
    mass += weight * state.sum;
    const float *from = run.sums + (row * run.splits + split) * run.value_ld;
    for (int64_t d = 0; d < run.value_ld; d += LANES) store(sums + d, load(from + d) * weight + load(sums + d));
  }
  return mass;
}

// out (+)= Wv[h'] sums + bv mass for n rows of one head.
static void unfold_values(const c2c_attention_params &p, const Run &run, int64_t kv_head, int64_t n, const float *sums,
                          const float *mass, float *inner, float *out, int64_t ldo) {
  const c2c_segment &segment = *run.segment;
  const c2c_tensor &proj = segment.value_proj, &proj_in = segment.value_proj_in;
  const float *x = sums;
  int64_t ldx = run.value_ld, width = run.value_width;
  if (proj_in.data) {
    const int64_t ld = round_up(segment.value_rank, PANEL);
    memset(inner, 0, n * ld * sizeof(float));
    dot_tokens(sums, run.value_ld, n, proj_in.dtype, proj_in.data, proj_in.stride[0], segment.value_rank,
               run.value_width, inner, ld, false);
    x = inner, ldx = ld, width = segment.value_rank;
  }
  dot_tokens(x, ldx, n, proj.dtype, at(proj, kv_head), proj.stride[1], p.value_dim, width, out, ldo, true);
  if (!segment.value_bias.data) return;
  float *bias = inner + QUERY_BLOCK * round_up(most<int64_t>(segment.value_rank, 1), PANEL);
  widen_row(bias, segment.value_bias.dtype, at(segment.value_bias, kv_head), p.value_dim);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < p.value_dim; ++d) out[i * ldo + d] += mass[i] * bias[d];
}

// States of a block of queries of one head merged, finished and written.
static void combine(const Forward &forward, int64_t b, int64_t h, int64_t i0, int64_t n, float *scratch) {
  const c2c_attention_params &p = forward.p;
  const int64_t row0 = (b * p.q_heads + h) * p.q_len + i0, ldo = round_up(p.value_dim, PANEL);
  float *out = scratch, *mass = out + QUERY_BLOCK * ldo, *rest = mass + QUERY_BLOCK;
  SoftmaxState total[QUERY_BLOCK];
  for (int64_t i = 0; i < n; ++i) {
    total[i] = initial_state(p, h);
    for (int64_t which = 0; which < forward.run_count; ++which)
      for (int64_t split = 0; split < forward.runs[which].splits; ++split)
        total[i].merge(forward.runs[which].states[(row0 + i) * forward.runs[which].splits + split]);
    if (p.lse.data) *lse_at(p, b, h, i0 + i) = total[i].finish();
  }
  memset(out, 0, n * ldo * sizeof(float));
  for (int64_t which = 0; which < forward.run_count; ++which) {
    const Run &run = forward.runs[which];
    const int64_t lds = run.absorbed ? run.value_ld : ldo;
    float *sums = run.absorbed ? rest : out;
    if (run.absorbed) memset(sums, 0, n * lds * sizeof(float));
    bool any = false;
    for (int64_t i = 0; i < n; ++i) {
      mass[i] = collect(run, row0 + i, total[i], sums + i * lds);
      any = any || mass[i] != 0.0f;
      if (p.mass.data) *mass_at(p, b, h, i0 + i, which) = mass[i];
    }
    if (run.absorbed && any)
      unfold_values(p, run, h / (p.q_heads / p.kv_heads), n, sums, mass, sums + QUERY_BLOCK * run.value_ld, out, ldo);
  }
  for (int64_t i = 0; i < n; ++i)
    narrow_row(p.out.dtype, const_cast<void *>(at(p.out, b, h, i0 + i)), out + i * ldo, p.value_dim);
}

static int64_t phase_scratch(const Run &run, const c2c_attention_params &p) {
  if (!run.absorbed) return QUERY_BLOCK * (round_up(p.value_dim, PANEL) + 1);
  int64_t rank = round_up(most(run.segment->key_rank, most<int64_t>(run.segment->value_rank, 1)), PANEL);
  int64_t width = most(run.value_ld, round_up(most(p.head_dim, p.value_dim), PANEL));
  return (QUERY_BLOCK + 1) * (2 * width + rank) + QUERY_BLOCK * (round_up(p.value_dim, PANEL) + 1);
}

// Memory for states and folded queries, which threads share.
static int64_t shared_size(const c2c_attention_params &p, Run &run, Carver &carver) {
  const int64_t rows = p.batch * p.q_heads * p.q_len;
  run.states = (SoftmaxState *)carver.take(2 * rows * run.splits);
  run.sums = carver.take(rows * run.splits * run.value_ld);
  if (run.absorbed) {
    run.folded = carver.take(rows * run.key_ld);
    run.folded_bias = carver.take(rows);
  }
  return carver.used;
}

// Floats that the stages of a run share: tokens and packed weights.
static int64_t staged_memory(const c2c_attention_params &p, const Run &run) {
  Carver carver{nullptr};
  TiledWeights weights[2];
  carver.take(stage_size(p, run));
  take_stage_weights(carver, p, run, weights);
  return carver.used;
}

// A run whose tokens are projected, or de-quantised and gathered, on the way: STAGED_TOKENS at a time, into memory that
// all threads share, so that a call needs no more of it for a longer cache. Called by every thread of the team.
static void attend_staged(const c2c_attention_params &p, const Run &run, float *memory, int threads, float *scratch) {
  Carver carver{memory};
  TiledWeights weights[2];
  float *const tokens = carver.take(stage_size(p, run));
  take_stage_weights(carver, p, run, weights);
  pack_stage_weights(p, run, weights);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = run_length(run, p, b);
    for (int64_t start = 0; start == 0 || start < length; start += STAGED_TOKENS) {
      const Stage stage(p, run, weights, tokens, start, least(length, start + STAGED_TOKENS));
      const int64_t units = stage.units(threads), jobs = run.groups * run.tiles * run.splits;
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units; ++unit) stage.fill(unit, b, threads, scratch);
#pragma omp for schedule(dynamic, 1)
      for (int64_t job = 0; job < jobs; ++job) attend_split(p, stage.run, b, job, start, length, false, scratch);
    }
  }
}

static c2c_status_code merged_attention(const c2c_attention_params &p) {
  if (p.batch * p.q_heads * p.q_len == 0) return C2C_OK;
  Array<Run> runs(1 + p.segment_count);
  if (!runs.data) return C2C_NO_MEMORY;
  Forward forward{p, runs.data, 0, 0, 0};
  double work = 0;
  bool absorbs = false;
  int64_t staged_floats = 0;
  for (int32_t s = -1; s < p.segment_count; ++s) {
    Run &run = forward.runs[forward.run_count++];
    run = Run{};
    describe_run(run, p, s < 0 ? nullptr : &p.segments[s]);
    run.splits = split_count(run, run.staged ? least(run.len, STAGED_TOKENS) : run.len);
    absorbs = absorbs || run.absorbed;
    run.first_job = forward.job_count;
    if (!run.staged) forward.job_count += p.batch * run.groups * run.tiles * run.splits;
    forward.scratch = most(forward.scratch, most(attention_scratch(run, p), phase_scratch(run, p)));
    work += (double)p.batch * p.q_heads * p.q_len * run.len * (run.key_width + run.value_width);
    if (!run.staged) continue;
    forward.scratch = most(forward.scratch, stage_scratch(p, run));
    staged_floats = most(staged_floats, staged_memory(p, run));
    work += stage_work(p, run);
  }
  Carver sizing{nullptr};
  const bool whole = forward.whole_rows();
  const int64_t kept = whole ? 0 : forward.run_count;  // runs whose states are combined at the end
  for (int64_t which = 0; which < kept; ++which) shared_size(p, forward.runs[which], sizing);
  const int threads = thread_count(p.threads, work);
  forward.scratch = round_up(forward.scratch, 1024) + 16;  // threads do not share a page
  sizing.take(staged_floats);
  Block memory(sizing.used + threads * forward.scratch);
  if (!memory.data) return C2C_NO_MEMORY;
  Carver shared{memory.data};
  for (int64_t which = 0; which < kept; ++which) shared_size(p, forward.runs[which], shared);
  float *const staged = shared.take(staged_floats);
  const int64_t blocks = div_up(p.q_len, QUERY_BLOCK), heads = p.batch * p.q_heads;
  Shares shares(forward.job_count, threads);
  if (!shares.allocated()) return C2C_NO_MEMORY;

#pragma omp parallel num_threads(threads)
  {
    float *scratch = memory.data + sizing.used + thread_number() * forward.scratch;
    if (absorbs) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < forward.run_count * heads * blocks; ++unit) {
        const Run &run = forward.runs[unit / blocks / heads];
        int64_t row = unit / blocks % heads, i0 = unit % blocks * QUERY_BLOCK;
        if (run.absorbed)
          fold_queries(p, run, row / p.q_heads, row % p.q_heads, i0, least(QUERY_BLOCK, p.q_len - i0), scratch);
      }
    }
    shares.each(thread_number(), [&](int64_t job) { attend(forward, job, scratch); });
#pragma omp barrier
    for (int64_t which = 0; which < forward.run_count; ++which)
      if (forward.runs[which].staged) attend_staged(p, forward.runs[which], staged, threads, scratch);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t unit = 0; unit < (whole ? 0 : heads * blocks); ++unit) {
      int64_t row = unit / blocks, i0 = unit % blocks * QUERY_BLOCK;
      combine(forward, row / p.q_heads, row % p.q_heads, i0, least(QUERY_BLOCK, p.q_len - i0), scratch);
    }
  }
  return C2C_OK;
}
