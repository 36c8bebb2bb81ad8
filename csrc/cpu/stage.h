// Tokens of a segment on their way to attention: projected into receiver space, or de-quantised and gathered as raw
// tokens, a few hundred at a time. Included inside an instruction set's namespace.

// What staged tokens are kept as: bfloat16 where matrix tiles project or read them, as PyTorch rounds them, else
// float32.
static int32_t staged_dtype(const c2c_attention_params &p, const c2c_project_params &params, const Half &half) {
  if (!MATRIX_TILES || p.query.dtype != C2C_BF16) return C2C_F32;
  const bool unchanged = !half.proj->data && !half.scale->data && !half.bias->data && half.raw->dtype == C2C_BF16;
  return unchanged || in_tiles(params, half, C2C_BF16) ? C2C_BF16 : C2C_F32;
}

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
  params.key_out.dtype = staged_dtype(p, params, half_of(params, true));
  params.value_out.dtype = staged_dtype(p, params, half_of(params, false));
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

// Weights that a call packs for a run's stages.
static void take_stage_weights(Carver &carver, const c2c_attention_params &p, const Run &run, TiledWeights weights[2]) {
  const c2c_project_params params = stage_params(p, run);
  for (int which = 0; which < 2; ++which) weights[which] = take_weights(carver, params, half_of(params, which == 0));
}

// Called by every thread of the team.
static void pack_stage_weights(const c2c_attention_params &p, const Run &run, const TiledWeights weights[2]) {
  const c2c_project_params params = stage_params(p, run);
  for (int which = 0; which < 2; ++which) {
    const Half half = half_of(params, which == 0);
    const int64_t units = weight_units(params, half);
    if (units == 0) continue;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) pack_weights(params, half, weights[which], unit);
  }
}

struct Stage {
  c2c_project_params params;
  const TiledWeights *weights;  // [2], of keys and values
  c2c_tensor key, value;
  Run run;  // reads the staged tokens under their own numbers
  int64_t start, stop;

  Stage(const c2c_attention_params &p, const Run &from, const TiledWeights *packed, float *memory, int64_t start_,
        int64_t stop_)
      : params(stage_params(p, from)), weights(packed), run(from), start(start_), stop(stop_) {
    const int64_t key_size = params.kv_heads * STAGED_TOKENS * run.key_dim;
    key = params.key_out = staged(memory, params.key_out.dtype, run.key_dim);
    value = params.value_out = staged(memory + key_size, params.value_out.dtype, run.value_dim);
    run.key = &key;
    run.value = &value;
  }
  Stage(const Stage &) = delete;

  c2c_tensor staged(float *memory, int32_t dtype, int64_t dim) const {
    return {(char *)memory - start * dim * dtype_size(dtype), {0, STAGED_TOKENS * dim, dim, 1}, dtype};
  }

  int64_t tiles() const { return div_up(stop - start, TOKEN_TILE); }
  int64_t head_parts(int threads) const { return 2 * tiles() < 4 * threads ? params.kv_heads : 1; }
  int64_t units(int threads) const { return 2 * tiles() * head_parts(threads); }

  // One tile of keys or values, of all heads or of one.
  void fill(int64_t unit, int64_t b, int threads, float *scratch) const {
    const int64_t parts = head_parts(threads), part = unit % parts, tile = unit / parts % tiles();
    const int64_t which = unit / parts / tiles();
    const Half half = half_of(params, which == 0);
    Carver carver{scratch};
    ProjectScratch x(carver, params, half);
    const int64_t first = parts > 1 ? part : 0, last = parts > 1 ? part + 1 : params.kv_heads;
    const int64_t j = start + tile * TOKEN_TILE, n = least(TOKEN_TILE, stop - j);
    project_tokens(params, half, weights[which], b, first, last, j, n, n <= STREAM_TOKENS, x);
  }
};
