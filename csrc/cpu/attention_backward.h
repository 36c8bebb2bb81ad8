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
  }
};

// Parts of a row's tokens that are differentiated independently: a function of heads and the row's own length alone.
static int64_t backward_splits(const Run &run, int64_t length) {
  return most<int64_t>(1, least(div_up(8, run.groups), length / (4 * BLOCK)));
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

static void load_tile_rows(const Backward &backward, int64_t which, const Tile &tile, BackwardScratch &x) {
  const c2c_attention_params &p = backward.p;
  const Run &run = tile.run;
  const c2c_tensor &delta = backward.params.delta;
  load_queries(tile, x.q, run.key_ld, p.scale);
  pack_panels_transposed(x.q_columns, x.q, run.key_ld, run.key_width, tile.rows);
  pack_panels(x.q_panels, x.q, run.key_ld, tile.rows, run.key_width);
  const int64_t padded = round_up(tile.rows, PANEL);
  for (int64_t r = 0; r < padded; ++r) x.row_base[r] = INF, x.row_rest[r] = x.row_delta[r] = 0.0f;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t h = tile.head(r / tile.queries), i = tile.i0 + r % tile.queries;
    x.row_base[r] = backward.base[(tile.b * p.q_heads + h) * p.q_len + i];
    x.row_rest[r] = backward.rest[(tile.b * p.q_heads + h) * p.q_len + i];
    x.row_delta[r] = number_at(
        delta, tile.b * delta.stride[0] + h * delta.stride[1] + i * delta.stride[2] + which * delta.stride[3]);
    widen_row(x.go + r * run.value_ld, backward.params.grad_out.dtype, at(backward.params.grad_out, tile.b, h, i),
              run.value_width);
  }
  pack_panels_transposed(x.go_columns, x.go, run.value_ld, run.value_width, tile.rows);
  pack_panels(x.go_panels, x.go, run.value_ld, tile.rows, run.value_width);
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

static void backward_block(Tile &tile, int64_t j, int64_t n, const BackwardRun &job, BackwardScratch &x) {
  const Run &run = tile.run;
  const c2c_attention_params &p = tile.p;
  const int64_t ld = round_up(tile.rows, PANEL) + 16;
  const bool masked = !run.segment && p.mask.data;
  if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) return;
  widen_tokens(run, *run.key, nullptr, run.key_dim, tile.b, tile.group, j, n, x.k, run.key_ld);
  widen_tokens(run, *run.value, nullptr, run.value_dim, tile.b, tile.group, j, n, x.v, run.value_ld);
  gemm(n, tile.rows, run.key_width, x.k, run.key_ld, 1, x.q_columns, PANEL, run.key_width * PANEL, x.s, ld, false);
  gemm(n, tile.rows, run.value_width, x.v, run.value_ld, 1, x.go_columns, PANEL, run.value_width * PANEL, x.dp, ld,
       false);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = tile.rows; r < round_up(tile.rows, LANES); ++r) x.s[t * ld + r] = x.dp[t * ld + r] = 0.0f;
  adjust_columns(tile, n, x.s, ld, nullptr, masked ? x.mask : nullptr, p.softcap > 0.0f ? x.slope : nullptr);
  float *grad_gate = add_to(job.grad_gate, (tile.b * p.q_heads + tile.head(0)) * run.len + j);
  weigh_gradients(tile, n, ld, x, grad_gate);
  const int64_t token = (tile.b * p.kv_heads + tile.group) * run.len + j;
  gemm(n, run.value_width, tile.rows, x.s, ld, 1, x.go_panels, PANEL, tile.rows * PANEL,
       job.grad_value + token * run.value_width, run.value_width, true);
  gemm(n, run.key_width, tile.rows, x.dp, ld, 1, x.q_panels, PANEL, tile.rows * PANEL,
       job.grad_key + token * run.key_width, run.key_width, true);
  pack_panels(x.k_panels, x.k, run.key_ld, n, run.key_width);
  gemm(tile.rows, run.key_width, n, x.dp, 1, ld, x.k_panels, PANEL, n * PANEL, x.grad_q, run.key_ld, true);
}

static void differentiate(const Backward &backward, int64_t number, float *scratch) {
  const c2c_attention_params &p = backward.p;
  int64_t which = backward.run_count - 1;
  while (number < backward.runs[which].first_job) --which;
  const BackwardRun &job = backward.runs[which];
  const Run &run = job.run;
  number -= job.first_job;
  const int64_t split = number % job.splits, group = number / job.splits % run.groups;
  const int64_t b = number / job.splits / run.groups;
  const int64_t length = run_length(run, p, b), parts = backward_splits(run, length);
  const int64_t chunk = round_up(div_up(length, parts), BLOCK);
  const int64_t begin = least(length, split * chunk), end = least(length, begin + chunk);
  // Padding has the gradient 0; the last part writes it.
  const int64_t stop = split == job.splits - 1 ? run.len : end;
  const int64_t token = (b * p.kv_heads + group) * run.len + begin;
  if (stop > begin) {
    memset(job.grad_key + token * run.key_width, 0, (stop - begin) * run.key_width * sizeof(float));
    memset(job.grad_value + token * run.value_width, 0, (stop - begin) * run.value_width * sizeof(float));
    for (int64_t g = 0; job.grad_gate && g < run.group_heads; ++g)
      memset(job.grad_gate + (b * p.q_heads + group * run.group_heads + g) * run.len + begin, 0,
             (stop - begin) * sizeof(float));
  }

  Carver carver{scratch};
  BackwardScratch x(carver, run, p);
  for (int64_t i0 = 0; i0 < p.q_len; i0 += run.tile_queries) {
    const int64_t queries = least(run.tile_queries, p.q_len - i0);
    Tile tile{p, run, b, group, i0, queries, begin, end};
    tile.backward = true;
    tile.keep_closed = job.grad_gate != nullptr;
    tile.prepare(x.lo, x.hi, x.coordinate, x.gates, length);
    memset(x.grad_q, 0, tile.rows * run.key_ld * sizeof(float));
    if (tile.begin < tile.end) load_tile_rows(backward, which, tile, x);
    for (int64_t j = tile.begin; j < tile.end; j += BLOCK) backward_block(tile, j, least(BLOCK, tile.end - j), job, x);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = (b * p.q_heads + tile.head(r / queries)) * p.q_len + i0 + r % queries;
      memcpy(job.grad_query + (split * p.batch * p.q_heads * p.q_len + row) * p.head_dim, x.grad_q + r * run.key_ld,
             p.head_dim * sizeof(float));
    }
  }
}

static c2c_status_code merged_attention_backward(const c2c_attention_backward_params &params) {
  const c2c_attention_params &p = params.forward;
  Array<BackwardRun> runs(1 + p.segment_count);
  if (!runs.data) return C2C_NO_MEMORY;
  Backward backward{params, p, runs.data, 0, 0, 0, nullptr, nullptr};
  const int64_t rows = p.batch * p.q_heads * p.q_len, query_size = rows * p.head_dim;
  double work = 0;
  Carver partial{nullptr};
  for (int32_t s = -1; s < p.segment_count; ++s) {
    BackwardRun &job = backward.runs[backward.run_count++];
    job = BackwardRun{Run{}, params.grad_key, params.grad_value, nullptr, 0, backward.job_count, nullptr};
    describe_run(job.run, p, s < 0 ? nullptr : &p.segments[s]);
    if (s >= 0) {
      job.grad_key = params.grad_segment_key[s];
      job.grad_value = params.grad_segment_value[s];
      job.grad_gate = params.grad_gate[s];
    }
    job.splits = backward_splits(job.run, job.run.len);
    backward.job_count += p.batch * job.run.groups * job.splits;
    partial.take(job.splits * query_size);
    Carver carver{nullptr};
    BackwardScratch sized(carver, job.run, p);
    Carver first{nullptr};
    NormaliserScratch sized_first(first, job.run, p);
    backward.scratch = most(backward.scratch, round_up(most(carver.used, first.used), 1024) + 16);
    work += 2.5 * (double)rows * job.run.len * (job.run.key_width + job.run.value_width);
  }
  partial.take(rows);
  partial.take(rows);
  const int threads = thread_count(p.threads, work);
  Block memory(partial.used + threads * backward.scratch);
  if (!memory.data) return C2C_NO_MEMORY;
  Carver carver{memory.data};
  for (int64_t which = 0; which < backward.run_count; ++which)
    backward.runs[which].grad_query = carver.take(backward.runs[which].splits * query_size);
  backward.base = carver.take(rows);
  backward.rest = carver.take(rows);
  const int64_t units = p.batch * backward.runs[0].run.groups * backward.runs[0].run.tiles;

#pragma omp parallel num_threads(threads)
  {
    float *scratch = memory.data + partial.used + thread_number() * backward.scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) normalise(backward, unit, scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < backward.job_count; ++job) differentiate(backward, job, scratch);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; ++row) {
      float *to = params.grad_query + row * p.head_dim;
      memset(to, 0, p.head_dim * sizeof(float));
      for (int64_t which = 0; which < backward.run_count; ++which)
        for (int64_t split = 0; split < backward.runs[which].splits; ++split) {
          const float *from = backward.runs[which].grad_query + split * query_size + row * p.head_dim;
          for (int64_t d = 0; d < p.head_dim; ++d) to[d] += from[d];
        }
      for (int64_t d = 0; d < p.head_dim; ++d) to[d] *= p.scale;
    }
  }
  return C2C_OK;
}
