// fuse_kv: which thread does which part of the fuser's network for which tokens. Included inside an instruction set's
// namespace.
//
// Tiles go through the network in waves of as many as there are threads, stage by stage with a barrier between: so
// threads read the same weights at about the same time. In a wave every thread takes an equal part of a stage's work:
// a tile of its own where there are enough, part of the weight rows of one where there are few.

static bool fuse_closed(const c2c_fuse_half &half) { return !half.gate.data && !(number_at(half.gate_logit, 0) > 0); }

static int64_t fuse_tokens(const c2c_fuse_half &half) { return half.batch * half.len; }

static double fuse_work(const c2c_fuse_half &half) {
  double weights = (double)(fuse_input_width(half) + half.kv_heads * (half.dim + 1)) * half.hidden;
  for (int32_t i = 0; i < 2 + half.project_count; ++i) weights += 2.0 * half.blocks[i].inner * half.hidden;
  return weights * fuse_tokens(half);
}

// out = residual, where it is other memory.
static void copy_residual(const c2c_fuse_half &half, int threads) {
  const c2c_tensor &from = half.residual, &to = half.out;
  if (from.data == to.data && from.dtype == to.dtype) return;
  const int64_t tokens = fuse_tokens(half);
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens > 64)
  for (int64_t token = 0; token < tokens; ++token) {
    float row[256];
    for (int64_t head = 0; head < half.kv_heads; ++head) {
      const char *read = (const char *)at(from, token / half.len, head, token % half.len);
      char *written = (char *)const_cast<void *>(at(to, token / half.len, head, token % half.len));
      if (from.dtype == to.dtype) {
        memcpy(written, read, half.dim * dtype_size(to.dtype));
        continue;
      }
      for (int64_t d = 0; d < half.dim; d += 256) {
        const int64_t n = least<int64_t>(256, half.dim - d);
        widen_row(row, from.dtype, read + d * dtype_size(from.dtype), n);
        narrow_row(to.dtype, written + d * dtype_size(to.dtype), row, n);
      }
    }
  }
}

// Tokens of a tile: 64, or fewer where these would leave threads without one. With 16 registers 32 at least: beyond
// that, reading the weights again costs more than sharing a tile's activations. With 32, whose products take four
// vectors of tokens at a time, always 64.
static int64_t fuse_tile_tokens(int64_t tokens, int threads) {
  const int64_t fewest = LANES == 16 ? 64 : 32;
  return most(fewest, least<int64_t>(64, round_up(div_up(tokens, threads), LANES)));
}

// Walks the tiles of all open halves.
struct FuseTiles {
  const c2c_fuse_params &params;
  int64_t size;
  int32_t half = 0;
  int64_t token = 0;

  // The next tile without its memory; false where none is left.
  bool next(FuseTile &tile) {
    for (; half < params.half_count; ++half, token = 0) {
      const c2c_fuse_half &at_half = params.halves[half];
      const int64_t left = fuse_tokens(at_half) - token;
      if (left <= 0 || fuse_closed(at_half)) continue;
      tile.half = &at_half;
      tile.first = token;
      tile.count = size == 64 && left <= FUSE_TOKENS ? left : least(size, left);
      tile.streamed = at_half.len <= STREAM_TOKENS;
      tile.tiled = !tile.streamed && fuse_in_tiles(at_half);
      token += tile.count;
      return true;
    }
    return false;
  }
};

// One thread's part of a stage: each tile's units weigh as its tokens do, and parts are equal by weight.
static void run_part(const FuseTile *tiles, int64_t count, int32_t number, int64_t thread, int64_t threads,
                     FuseScratch &x) {
  auto units = [&](const FuseTile &tile, FuseStage stage) -> int64_t {
    if (stage.kind == FuseStage::NONE) return 0;
    return stage.kind == FuseStage::LOAD ? div_up(tile.count, LANES) : div_up(stage.rows(*tile.half), FUSE_ROWS);
  };
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += units(tiles[i], FuseStage(*tiles[i].half, number)) * tiles[i].padded();
  const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
  int64_t passed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const FuseStage stage(*tiles[i].half, number);
    const int64_t n = units(tiles[i], stage), weight = tiles[i].padded();
    const int64_t first = div_up(most<int64_t>(0, begin - passed), weight);
    const int64_t last = div_up(most<int64_t>(0, end - passed), weight);
    run_stage(tiles[i], stage, least(n, first), least(n, last), x);
    passed += n * weight;
  }
}

static c2c_status_code fuse_kv(const c2c_fuse_params &p) {
  int64_t tile_floats = 0, widest = 0, tokens = 0;
  int32_t stages = 0;
  double work = 0;
  for (int32_t i = 0; i < p.half_count; ++i) {
    const c2c_fuse_half &half = p.halves[i];
    if (fuse_closed(half)) continue;
    Carver carver{nullptr};
    FuseTile tile;
    carve_tile(carver, half, tile);
    tile_floats = most(tile_floats, carver.used);
    widest = most(widest, fuse_widest(half));
    tokens += fuse_tokens(half);
    stages = most(stages, fuse_stage_count(half));
    work += fuse_work(half);
  }
  const int threads = thread_count(p.threads, work);
  const int64_t size = fuse_tile_tokens(tokens, threads);
  const int64_t together = least<int64_t>(div_up(tokens, size) + p.half_count, threads);
  Carver thread_size{nullptr};
  FuseScratch sized(thread_size, widest);
  const int64_t thread_floats = round_up(thread_size.used, 1024) + 16;
  Block memory(together * tile_floats + threads * thread_floats);
  Array<FuseTile> wave(most<int64_t>(1, together));
  if (!memory.data || !wave.data) return C2C_NO_MEMORY;
  for (int32_t i = 0; i < p.half_count; ++i)
    if (fuse_closed(p.halves[i])) copy_residual(p.halves[i], threads);
  if (!tokens) return C2C_OK;

  FuseTiles all{p, size};
  int64_t count = 0;
#pragma omp parallel num_threads(threads)
  {
    Carver carver{memory.data + together * tile_floats + thread_number() * thread_floats};
    FuseScratch x(carver, widest);
    while (true) {
#pragma omp single
      for (count = 0; count < together && all.next(wave.data[count]); ++count) {
        Carver memory_of_tile{memory.data + count * tile_floats};
        carve_tile(memory_of_tile, *wave.data[count].half, wave.data[count]);
      }
      if (!count) break;
      for (int32_t stage = 0; stage < stages; ++stage) {
        run_part(wave.data, count, stage, thread_number(), team_size(), x);
#pragma omp barrier
      }
    }
  }
  return C2C_OK;
}
