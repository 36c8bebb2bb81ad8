// project_kv: jobs over tiles of tokens. Included inside an instruction set's namespace.

// How a call is cut into jobs: halves x batch x tiles of tokens, each in `token_parts` by `head_parts`.
struct ProjectJobs {
  int64_t tiles, token_parts = 1, head_parts = 1, count;

  // Few tiles: parts of their tokens are a parallel dimension too, where that changes no bit, and heads, at the price
  // of loading a tile once per head.
  ProjectJobs(const c2c_project_params &p, bool tiled, int threads) : tiles(div_up(p.segment.len, TOKEN_TILE)) {
    count = 2 * p.batch * tiles;
    if (tiled && count < 4 * threads) token_parts = TOKEN_TILE / SMALL_TILE;
    if (token_parts * count < 4 * threads) head_parts = p.kv_heads;
    count *= token_parts * head_parts;
  }
};

// Part `part` of a tile of tokens for heads first .. last of one half: projection of what is valid, zeros behind it.
static void project_job(const c2c_project_params &p, const Half &half, const TiledWeights &weights, int64_t b,
                        int64_t tile, int64_t part, int64_t parts, int64_t first, int64_t last, ProjectScratch &x) {
  const c2c_segment &s = p.segment;
  const int64_t length = s.lengths.data ? integer_at(s.lengths, b * s.lengths.stride[0]) : s.len;
  const int64_t start = tile * TOKEN_TILE, size = TOKEN_TILE / parts, j = start + part * size;
  const int64_t end = least(s.len, j + size), valid = most<int64_t>(0, least(length, end) - j);
  const bool few = least(length, start + TOKEN_TILE) - start <= STREAM_TOKENS;
  if (valid) project_tokens(p, half, weights, b, first, last, j, valid, few, x);
  memset(x.row, 0, half.out_dim * sizeof(float));
  for (int64_t head = first; head < last; ++head)
    for (int64_t token = j + valid; token < end; ++token)
      narrow_row(half.out->dtype, const_cast<void *>(at(*half.out, b, head, token)), x.row, half.out_dim);
}

static c2c_status_code project_kv(const c2c_project_params &p) {
  const Half halves[2] = {half_of(p, true), half_of(p, false)};
  const bool packs = p.segment.len > STREAM_TOKENS;
  int64_t floats = 0, units[2] = {};
  double work = 0;
  Carver sizing{nullptr};
  for (int h = 0; h < 2; ++h) {
    floats = most(floats, project_scratch(p, halves[h]));
    work += project_work(p, halves[h]);
    if (!packs) continue;
    take_weights(sizing, p, halves[h]);
    units[h] = weight_units(p, halves[h]);
  }
  const int threads = thread_count(p.threads, work);
  const ProjectJobs jobs(p, units[0] && units[1], threads);
  floats = round_up(floats, 1024) + 16;
  Block memory(sizing.used + threads * floats);
  if (!memory.data) return C2C_NO_MEMORY;
  Carver shared{memory.data};
  TiledWeights weights[2];
  for (int h = 0; packs && h < 2; ++h) weights[h] = take_weights(shared, p, halves[h]);
#pragma omp parallel num_threads(threads)
  {
    float *const scratch = memory.data + sizing.used + thread_number() * floats;
    if (units[0] + units[1]) {
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < units[0] + units[1]; ++unit) {
        const int h = unit >= units[0];
        pack_weights(p, halves[h], weights[h], h ? unit - units[0] : unit);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < jobs.count; ++job) {
      int64_t rest = job;
      auto next = [&](int64_t size) {
        const int64_t at = rest % size;
        rest /= size;
        return at;
      };
      const int64_t head = next(jobs.head_parts), part = next(jobs.token_parts), tile = next(jobs.tiles);
      const int64_t h = next(2), b = rest;
      const bool one = jobs.head_parts > 1;
      Carver carver{scratch};
      ProjectScratch x(carver, p, halves[h]);
      project_job(p, halves[h], weights[h], b, tile, part, jobs.token_parts, one ? head : 0,
                  one ? head + 1 : p.kv_heads, x);
    }
  }
  return C2C_OK;
}
