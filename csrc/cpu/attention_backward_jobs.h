// Jobs of the backward pass: a block of tokens, a part of a run, the call. Included inside an instruction set's
// namespace.

// Query rows of a tile and what belongs to them, packed for the products.
static void load_tile_rows(const Backward &backward, int64_t which, const Tile &tile, bool tiled, BackwardScratch &x) {
  const c2c_attention_params &p = backward.p;
  const Run &run = tile.run;
  const c2c_tensor &delta = backward.params.delta;
  load_queries(tile, x.q, run.key_ld, tiled ? 1.0f : p.scale);
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
  if (tiled) return pack_backward_rows(tile, x);
  pack_panels_transposed(x.q_columns, x.q, run.key_ld, run.key_width, tile.rows);
  pack_panels(x.q_panels, x.q, run.key_ld, tile.rows, run.key_width);
  pack_panels_transposed(x.go_columns, x.go, run.value_ld, run.value_width, tile.rows);
  pack_panels(x.go_panels, x.go, run.value_ld, tile.rows, run.value_width);
}

static void backward_block(Tile &tile, int64_t j, int64_t n, const BackwardRun &job, bool tiled, BackwardScratch &x) {
  const Run &run = tile.run;
  const c2c_attention_params &p = tile.p;
  const int64_t ld = round_up(tile.rows, PANEL) + 16;
  const bool masked = !run.segment && p.mask.data;
  if (!tile.enter_block(j, n) || (masked && !load_mask(tile, j, n, x.mask))) return;
  if (tiled) {
    backward_products(tile, j, n, x, ld);
  } else {
    widen_tokens(run, *run.key, nullptr, run.key_dim, tile.b, tile.group, j, n, x.k, run.key_ld);
    widen_tokens(run, *run.value, nullptr, run.value_dim, tile.b, tile.group, j, n, x.v, run.value_ld);
    gemm(n, tile.rows, run.key_width, x.k, run.key_ld, 1, x.q_columns, PANEL, run.key_width * PANEL, x.s, ld, false);
    gemm(n, tile.rows, run.value_width, x.v, run.value_ld, 1, x.go_columns, PANEL, run.value_width * PANEL, x.dp, ld,
         false);
  }
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = tile.rows; r < round_up(tile.rows, LANES); ++r) x.s[t * ld + r] = x.dp[t * ld + r] = 0.0f;
  adjust_columns(tile, n, x.s, ld, nullptr, masked ? x.mask : nullptr, p.softcap > 0.0f ? x.slope : nullptr);
  float *grad_gate = add_to(job.grad_gate, (tile.b * p.q_heads + tile.head(0)) * run.len + j);
  weigh_gradients(tile, n, ld, x, grad_gate);
  const int64_t token = (tile.b * p.kv_heads + tile.group) * run.len + j;
  float *const grad_key = job.grad_key + token * run.key_width;
  float *const grad_value = job.grad_value + token * run.value_width;
  if (tiled) return add_gradients(tile, n, grad_key, grad_value, x, ld);
  gemm(n, run.value_width, tile.rows, x.s, ld, 1, x.go_panels, PANEL, tile.rows * PANEL, grad_value, run.value_width,
       true);
  gemm(n, run.key_width, tile.rows, x.dp, ld, 1, x.q_panels, PANEL, tile.rows * PANEL, grad_key, run.key_width, true);
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
  const bool by_tiles = differentiates_by_tiles(run, backward.params);
  const TileRegisters registers;
  for (int64_t i0 = 0; i0 < p.q_len; i0 += run.tile_queries) {
    const int64_t queries = least(run.tile_queries, p.q_len - i0);
    Tile tile{p, run, b, group, i0, queries, begin, end};
    tile.backward = true;
    tile.keep_closed = job.grad_gate != nullptr;
    tile.prepare(x.lo, x.hi, x.coordinate, x.gates, length);
    memset(x.grad_q, 0, round_up(tile.rows, PANEL) * run.key_ld * sizeof(float));
    const bool tiled = by_tiles && !has_far_rows(tile);
    if (tile.begin < tile.end) {
      load_tile_rows(backward, which, tile, tiled, x);
      for (int64_t j = tile.begin; j < tile.end; j += BLOCK)
        backward_block(tile, j, least(BLOCK, tile.end - j), job, tiled, x);
      if (tiled) turn_query_gradients(tile, x);
    }
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
