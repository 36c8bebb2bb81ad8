// A tile of tokens on its way through the fuser's network: where its activations lie, and products with weights, which
// are read as they are stored. Included inside an instruction set's namespace.
//
// Many tokens: activations are columns in panels, [tokens / PANEL][features][PANEL], as gemm reads its B; a weight is
// broadcast against 16 to 64 tokens. Where weights and caches are bfloat16 and matrix tiles multiply (`tiled`), what
// the products read is rounded to it, as PyTorch rounds it, and packed in pairs of features (matrix_tiles.h); the
// residual stream stays float32. Few tokens (`streamed`): activations are rows, [tokens][features padded to vectors],
// and weights pass by once as the stored tokens of dot products. Which one it is depends on the tokens of a batch row
// alone, so that nothing else in the batch changes a bit.

constexpr int64_t FUSE_TOKENS = 96;  // of a tile at most: 64, and what is left where it is little
constexpr int64_t FUSE_ROWS = 48;    // weight rows of a unit of work: eight register tiles of six, or six of eight

struct FuseTile {
  const c2c_fuse_half *half;
  int64_t first, count;  // tokens, counted through the rows of the batch
  bool streamed, tiled;
  float *x;       // input, later what lies between a block's two products
  float *h;       // [hidden] residual stream
  float *main;    // [hidden] what the next product on the way to the projection reads
  float *side;    // [hidden] the same on the way to the weights of heads
  float *weight;  // [kv_heads] sigmoid of the weights of heads

  int64_t padded() const { return round_up(count, LANES); }
};

static int64_t fuse_input_width(const c2c_fuse_half &half) {
  return half.sharer_heads * half.sharer_dim + half.kv_heads * half.dim;
}

static int64_t fuse_widest(const c2c_fuse_half &half) {
  int64_t widest = most(fuse_input_width(half), half.hidden);
  for (int32_t i = 0; i < 2 + half.project_count; ++i) widest = most(widest, half.blocks[i].inner);
  return widest;
}

// Whether more than a few tokens of a half are multiplied by matrix tiles.
static bool fuse_in_tiles(const c2c_fuse_half &half) {
  auto narrow = [](const c2c_tensor &t) { return t.dtype == C2C_BF16; };
  bool all = narrow(half.sharer) && narrow(half.receiver) && narrow(half.in_weight) && narrow(half.scale_weight);
  for (int32_t i = 0; i < 2 + half.project_count; ++i)
    all = all && narrow(half.blocks[i].w1) && narrow(half.blocks[i].w2);
  return MATRIX_TILES && all && narrow(half.out_weight);
}

static void carve_tile(Carver &carver, const c2c_fuse_half &half, FuseTile &tile) {
  const int64_t hidden = FUSE_TOKENS * round_up(half.hidden, LANES);
  tile.x = carver.take(FUSE_TOKENS * round_up(fuse_widest(half), LANES));
  tile.h = carver.take(hidden);
  tile.main = carver.take(hidden);
  tile.side = carver.take(hidden);
  tile.weight = carver.take(FUSE_TOKENS * round_up(half.kv_heads, LANES));
}

// One thread's own memory.
struct FuseScratch {
  float *products;  // [FUSE_ROWS][FUSE_TOKENS], or [FUSE_TOKENS][FUSE_ROWS] of streamed tokens
  float *turned;    // [FUSE_TOKENS][FUSE_ROWS] products on their way out
  float *rows;      // weight rows in float32, or tokens as rows
  float *inverse;   // [FUSE_TOKENS] 1 / rms
  float *bias, *norm, *side_norm, *residual;  // [FUSE_ROWS] of the rows at hand

  // `widest`: of all vectors that the threads' tiles hold.
  FuseScratch(Carver &carver, int64_t widest) {
    products = carver.take(FUSE_ROWS * FUSE_TOKENS);
    turned = carver.take(FUSE_ROWS * FUSE_TOKENS);
    rows = carver.take(most<int64_t>(LANES, TILE_ROWS) * round_up(widest, LANES));
    inverse = carver.take(FUSE_TOKENS);
    bias = carver.take(FUSE_ROWS);
    norm = carver.take(FUSE_ROWS);
    side_norm = carver.take(FUSE_ROWS);
    residual = carver.take(FUSE_ROWS);
  }
};

// A vector of results: weight row `r` of a unit for tokens t .. t + LANES.
struct AcrossTokens {
  int64_t r, t;
  V feature(const float *values) const { return set1(values[r]); }
  V token(const float *values) const { return load(values + t); }
  float *in(float *buffer, int64_t features, int64_t first) const {
    return buffer + (t / PANEL * features + first + r) * PANEL + t % PANEL;
  }
  void put(float *operand, int64_t features, int64_t first, V value) const {
    store(in(operand, features, first), value);
  }
};

// The same for token `t` and weight rows r .. r + LANES.
struct AcrossRows {
  int64_t r, t;
  V feature(const float *values) const { return load(values + r); }
  V token(const float *values) const { return set1(values[t]); }
  float *in(float *buffer, int64_t features, int64_t first) const {
    return buffer + t * round_up(features, LANES) + first + r;
  }
  void put(float *operand, int64_t features, int64_t first, V value) const {
    store(in(operand, features, first), value);
  }
};

#if defined(C2C_MATRIX_TILES)
// Like AcrossTokens, with operands in packed tiles: features r and r + 1 share a number of 32 bits; r is called first.
struct AcrossPairs : AcrossTokens {
  void put(float *operand, int64_t features, int64_t first, V value) const {
    const int64_t k = first + r, depth_tiles = div_up(features, DEPTH);
    float *const tile = operand + (t / SIDE * depth_tiles + k / DEPTH) * (PACKED / 2) + t % SIDE;
    float *const pair = tile + k % DEPTH / 2 * SIDE;
    const VU number = round_to_bf16(value);
    store(pair, bit_cast<V>(k % 2 ? bit_cast<VU>(load(pair)) | (number & 0xffff0000u) : number >> 16));
    if (k + 1 == features)
      for (int64_t rest = k % DEPTH / 2 + 1; rest < SIDE; ++rest) store(tile + rest * SIDE, V{});
  }
};
#endif

// f(results, their place) over the products of n weight rows.
template <class F>
static ALWAYS_INLINE void each_product(const FuseTile &tile, int64_t n, const float *products, F f) {
  if (tile.streamed) {
    for (int64_t t = 0; t < tile.count; ++t)
      for (int64_t r = 0; r < n; r += LANES) f(load(products + t * FUSE_ROWS + r), AcrossRows{r, t});
    return;
  }
  auto across = [&](auto place) __attribute__((always_inline)) {
    for (place.r = 0; place.r < n; ++place.r)
      for (place.t = 0; place.t < tile.padded(); place.t += LANES)
        f(load(products + place.r * FUSE_TOKENS + place.t), place);
  };
#if defined(C2C_MATRIX_TILES)
  if (tile.tiled) return across(AcrossPairs{});
#endif
  across(AcrossTokens{});
}

// What a pass over weight rows asks for meanwhile: the rows after it, where rows lie one behind the other.
static Upcoming following_rows(const c2c_tensor &weights, int64_t width, int64_t row, int64_t rows) {
  Upcoming next;
  if (weights.stride[0] != width) return next;
  next.data = (const char *)at(weights, row);
  next.bytes = rows * width * dtype_size(weights.dtype);
  next.parts = rows > 0;
  return next;
}

// products = weights[row .. row + n] x tokens in columns. A sum over the width is made of sums over pieces of it: its
// error grows with a piece. Rows go one register tile at a time through the whole width, in the order of addresses.
static void multiply_columns(const FuseTile &tile, const c2c_tensor &weights, int64_t width, const float *operand,
                             int64_t row, int64_t n, FuseScratch &x) {
  const int64_t tokens = tile.padded(), together = tokens > 3 * LANES ? tile_rows<4>() : TILE_ROWS;
  for (int64_t r = 0; r < n; r += together) {
    const int64_t rows = least(together, n - r);
    const float *w = (const float *)at(weights, row + r);
    int64_t ld = weights.stride[0];
    if (weights.dtype != C2C_F32) {
      ld = round_up(width, LANES);
      for (int64_t i = 0; i < rows; ++i) widen_row(x.rows + i * ld, weights.dtype, at(weights, row + r + i), width);
      w = x.rows;
    }
    Upcoming next = following_rows(weights, width, row + r + rows, least(together, n - r - rows));
    for (int64_t k = 0; k < width; k += PIECE)
      gemm(rows, tokens, least(PIECE, width - k), w + k, ld, 1, operand + k * PANEL, PANEL, width * PANEL,
           x.products + r * FUSE_TOKENS, FUSE_TOKENS, k > 0, &next);
  }
}

// The same for tokens in rows; products of rows beyond n, up to a vector, are 0.
static void multiply_streamed(const FuseTile &tile, const c2c_tensor &weights, int64_t width, const float *operand,
                              int64_t row, int64_t n, FuseScratch &x) {
  for (int64_t t = 0; t < tile.count; ++t)
    for (int64_t r = n; r < round_up(n, LANES); ++r) x.products[t * FUSE_ROWS + r] = 0.0f;
  dot_weights(operand, round_up(width, LANES), tile.count, weights.dtype, at(weights, row), weights.stride[0], n, width,
              x.products, FUSE_ROWS, at(weights, row + n));
}

// The same for packed pairs of features: weights where they lie, if they are whole tiles, else packed, 16 rows at a
// time.
static void multiply_packed_columns(const FuseTile &tile, const c2c_tensor &weights, int64_t width,
                                    const float *operand, int64_t row, int64_t n, FuseScratch &x) {
#if defined(C2C_MATRIX_TILES)
  const TileRegisters registers;
  const int64_t depth_tiles = div_up(width, DEPTH), ld = weights.stride[0];
  auto multiply = [&](const TileRows &rows, int64_t r, int64_t down) {
    gemm_tiles(down, div_up(tile.count, SIDE), depth_tiles, rows, (const bf16 *)operand, depth_tiles * PACKED,
               x.products + r * FUSE_TOKENS, FUSE_TOKENS, false);
  };
  const int64_t whole = width % DEPTH ? 0 : n / SIDE * SIDE;
  if (whole) multiply({(const bf16 *)at(weights, row), ld, SIDE * ld, DEPTH}, 0, whole / SIDE);
  for (int64_t r = whole; r < n; r += SIDE) {
    bf16 *const packed = (bf16 *)x.rows;
    const int64_t rows = least(SIDE, n - r);
    for (int64_t i = 0; i < rows; ++i) {
      bf16 *const to = packed_row(packed, i, depth_tiles);
      pack_row(to, 0, (const bf16 *)at(weights, row + r + i), width);
      end_packed_row(to, width);
    }
    end_packed_rows(packed, rows, depth_tiles);
    multiply(packed_rows(packed, depth_tiles), r, 1);
  }
#else
  (void)tile, (void)weights, (void)width, (void)operand, (void)row, (void)n, (void)x;
#endif
}

static void multiply_tile(const FuseTile &tile, const c2c_tensor &weights, int64_t width, const float *operand,
                          int64_t row, int64_t n, FuseScratch &x) {
  (tile.streamed ? multiply_streamed
   : tile.tiled  ? multiply_packed_columns
                 : multiply_columns)(tile, weights, width, operand, row, n, x);
}
