// Tokens of a segment on their way to attention: projected into receiver space, or de-quantised and gathered as raw
// tokens, a few hundred at a time. Included inside an instruction set's namespace.

// The segment with nothing left of it but what a stage applies, as a call of project_kv.
static c2c_project_params stage_params(const c2c_attention_params &p, const Run &run) {
  c2c_project_params params = {};
  params.segment = *run.segment;
  params.batch = p.batch;
  params.kv_heads = run.absorbed ? run.segment->heads : p.kv_heads;
  params.head_dim = run.key_dim;
  params.out_dim = run.value_dim;
  if (run.absorbed) {
    c2c_segment &s = params.segment;
    s.key_proj = s.key_proj_in = s.key_bias = s.value_proj = s.value_proj_in = s.value_bias = c2c_tensor{};
  }
  return params;
}

static int64_t stage_size(const c2c_attention_params &p, const Run &run) {
  return stage_params(p, run).kv_heads * STAGED_TOKENS * (run.key_dim + run.value_dim);
}

static int64_t stage_scratch(const c2c_attention_params &p, const Run &run) {
  const c2c_project_params params = stage_params(p, run);
  return most(project_scratch(params, half_of(params, true)), project_scratch(params, half_of(params, false)));
}

static double stage_work(const c2c_attention_params &p, const Run &run) {
  const c2c_project_params params = stage_params(p, run);
  return project_work(params, half_of(params, true)) + project_work(params, half_of(params, false));
}

struct Stage {
  c2c_project_params params;
  c2c_tensor key, value;
  Run run;  // reads the staged tokens under their own numbers
  int64_t start, stop;

  Stage(const c2c_attention_params &p, const Run &from, float *memory, int64_t start_, int64_t stop_)
      : params(stage_params(p, from)), run(from), start(start_), stop(stop_) {
    const int64_t key_size = params.kv_heads * STAGED_TOKENS * run.key_dim;
    key = params.key_out = staged(memory, run.key_dim);
    value = params.value_out = staged(memory + key_size, run.value_dim);
    run.key = &key;
    run.value = &value;
  }
  Stage(const Stage &) = delete;

  c2c_tensor staged(float *memory, int64_t dim) const {
    return {memory - start * dim, {0, STAGED_TOKENS * dim, dim, 1}, C2C_F32};
  }

  int64_t tiles() const { return div_up(stop - start, TOKEN_TILE); }
  int64_t head_parts(int threads) const { return 2 * tiles() < 4 * threads ? params.kv_heads : 1; }
  int64_t units(int threads) const { return 2 * tiles() * head_parts(threads); }

  // One tile of keys or values, of all heads or of one.
  void fill(int64_t unit, int64_t b, int threads, float *scratch) const {
    const int64_t parts = head_parts(threads), part = unit % parts, tile = unit / parts % tiles();
    const Half half = half_of(params, unit / parts / tiles() == 0);
    Carver carver{scratch};
    ProjectScratch x(carver, params, half);
    const int64_t first = parts > 1 ? part : 0, last = parts > 1 ? part + 1 : params.kv_heads;
    const int64_t j = start + tile * TOKEN_TILE;
    project_tile(params, half, b, first, last, j, least(TOKEN_TILE, stop - j), x);
  }
};
