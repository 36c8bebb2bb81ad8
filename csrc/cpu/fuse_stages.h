// The stages of the fuser's network over a tile of tokens. Each is a product with one matrix, taken a few weight rows
// at a time, and what follows it element by element, done while the products are at hand. Included inside an
// instruction set's namespace.
//
//     0               x = [sharer, receiver]
//     1               h = in_weight x + in_bias
//     2, 3            h += w2 gelu(w1 rmsnorm(h))              blocks[0], embed
//     4, 5            side = h + w2 gelu(w1 rmsnorm(h))        blocks[1], scale
//     6               weight = sigmoid(scale_weight side + scale_bias)
//     7 + 2i, 8 + 2i  h += w2 gelu(w1 rmsnorm(h))              blocks[2 + i], project
//     last            out = residual + gate * weight * (out_weight h + out_bias)
//
// rmsnorm is split: its weight is applied where h is written, 1 / rms behind the product that reads it.

constexpr float RMS_EPSILON = 1e-6f;

// Which stage of which block a number is.
struct FuseStage {
  enum Kind { LOAD, ENTER, UP, DOWN, WEIGH, LEAVE, NONE } kind;
  int32_t block;

  FuseStage(const c2c_fuse_half &half, int32_t number) : kind(NONE), block(0) {
    const int32_t last = 7 + 2 * half.project_count;
    if (number > last) return;
    if (number == last) {
      kind = LEAVE;
    } else if (number < 2 || number == 6) {
      kind = number == 0 ? LOAD : number == 1 ? ENTER : WEIGH;
    } else {
      const int32_t step = number < 6 ? number - 2 : number - 3;
      block = step / 2;
      kind = step % 2 ? DOWN : UP;
    }
  }

  // Rows of its matrix.
  int64_t rows(const c2c_fuse_half &half) const {
    return kind == UP      ? half.blocks[block].inner
           : kind == WEIGH ? half.kv_heads
           : kind == LEAVE ? half.kv_heads * half.dim
                           : half.hidden;
  }
};

static int32_t fuse_stage_count(const c2c_fuse_half &half) { return 8 + 2 * half.project_count; }

// Numbers first .. first + n of a vector in float32, up to a vector's end zeros.
static void widen_vector(float *to, const c2c_tensor &from, int64_t first, int64_t n) {
  for (int64_t i = n / LANES * LANES; i < round_up(n, LANES); ++i) to[i] = 0.0f;
  widen_row(to, from.dtype, at(from, first), n);
}

// x of tokens t .. t + n of the tile, n <= LANES.
static void load_tokens(const FuseTile &tile, int64_t t, int64_t n, FuseScratch &x) {
  const c2c_fuse_half &half = *tile.half;
  const int64_t width = fuse_input_width(half), ld = round_up(width, LANES);
  float *const rows = tile.streamed ? tile.x + t * ld : x.rows;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = tile.first + t + i, b = token / half.len, own = token % half.len;
    const c2c_tensor &index = half.index;
    const int64_t raw = index.data ? integer_at(index, b * index.stride[0] + own * index.stride[1]) : own;
    float *to = rows + i * ld;
    for (int64_t head = 0; head < half.sharer_heads; ++head, to += half.sharer_dim)
      widen_row(to, half.sharer.dtype, at(half.sharer, b, head, raw), half.sharer_dim);
    for (int64_t head = 0; head < half.kv_heads; ++head, to += half.dim)
      widen_row(to, half.receiver.dtype, at(half.receiver, b, head, own), half.dim);
  }
  if (tile.streamed) return;
#if defined(C2C_MATRIX_TILES)
  if (tile.tiled) return pack_tile_columns((bf16 *)tile.x + t * round_up(width, DEPTH), rows, ld, n, width);
#endif
  transpose_rows(rows, ld, n, width, tile.x + t / PANEL * width * PANEL + t % PANEL, PANEL);
}

// 1 / rms(h) of every token, in four chains each.
static void inverse_rms(const FuseTile &tile, FuseScratch &x) {
  const int64_t hidden = tile.half->hidden;
  auto root = [&](float squares) { return 1.0f / sqrtf(squares / (float)hidden + RMS_EPSILON); };
  if (tile.streamed) {
    for (int64_t t = 0; t < tile.count; ++t) {
      const float *row = tile.h + t * round_up(hidden, LANES);
      V squares[4] = {};
      for (int64_t r = 0; r < hidden; r += LANES) {  // zeros behind `hidden`
        const V h = load(row + r);
        V &chain = squares[r / LANES % 4];
        chain = h * h + chain;
      }
      x.inverse[t] = root(sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
    }
    return;
  }
  for (int64_t t = 0; t < tile.padded(); t += LANES) {
    V squares[4] = {};
    int64_t r = 0;
    auto add = [&](int chain) __attribute__((always_inline)) {
      const V h = load(AcrossTokens{r++, t}.in(tile.h, hidden, 0));
      squares[chain] = h * h + squares[chain];
    };
    while (r + 4 <= hidden) {
#pragma GCC unroll 4
      for (int chain = 0; chain < 4; ++chain) add(chain);
    }
    while (r < hidden) add(0);
    store(x.inverse + t, (squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (int64_t i = t; i < t + LANES; ++i) x.inverse[i] = root(x.inverse[i]);
  }
}

static void enter(const FuseTile &tile, int64_t row, int64_t n, FuseScratch &x) {
  const c2c_fuse_half &half = *tile.half;
  multiply_tile(tile, half.in_weight, fuse_input_width(half), tile.x, row, n, x);
  widen_vector(x.bias, half.in_bias, row, n);
  widen_vector(x.norm, half.blocks[0].norm, row, n);
  each_product(tile, n, x.products, [&](V product, auto place) {
    const V h = product + place.feature(x.bias);
    store(place.in(tile.h, half.hidden, row), h);
    place.put(tile.main, half.hidden, row, h * place.feature(x.norm));
  });
}

static void go_up(const FuseTile &tile, int32_t block, int64_t row, int64_t n, FuseScratch &x) {
  const c2c_fuse_half &half = *tile.half;
  const c2c_fuse_block &weights = half.blocks[block];
  multiply_tile(tile, weights.w1, half.hidden, block == 1 ? tile.side : tile.main, row, n, x);
  each_product(tile, n, x.products, [&](V product, auto place) {
    place.put(tile.x, weights.inner, row, vgelu(product * place.token(x.inverse)));
  });
}

// The block's sum, and what reads it: after the embedding the scale block and the first projecting one.
static void go_down(const FuseTile &tile, int32_t block, int64_t row, int64_t n, FuseScratch &x) {
  const c2c_fuse_half &half = *tile.half;
  const c2c_fuse_block &weights = half.blocks[block];
  multiply_tile(tile, weights.w2, weights.inner, tile.x, row, n, x);
  const int32_t next = block == 0 ? 2 : block + 1;
  const bool norms = next < 2 + half.project_count;
  if (block == 0) widen_vector(x.side_norm, half.blocks[1].norm, row, n);
  if (block != 1 && norms) widen_vector(x.norm, half.blocks[next].norm, row, n);
  each_product(tile, n, x.products, [&](V product, auto place) {
    const V h = load(place.in(tile.h, half.hidden, row)) + product;
    if (block == 1) return place.put(tile.side, half.hidden, row, h);
    store(place.in(tile.h, half.hidden, row), h);
    place.put(tile.main, half.hidden, row, norms ? h * place.feature(x.norm) : h);
    if (block == 0) place.put(tile.side, half.hidden, row, h * place.feature(x.side_norm));
  });
}

static void weigh(const FuseTile &tile, int64_t row, int64_t n, FuseScratch &x) {
  const c2c_fuse_half &half = *tile.half;
  multiply_tile(tile, half.scale_weight, half.hidden, tile.side, row, n, x);
  widen_vector(x.bias, half.scale_bias, row, n);
  each_product(tile, n, x.products, [&](V product, auto place) {
    store(place.in(tile.weight, half.kv_heads, row), 1.0f / (vexp(-(product + place.feature(x.bias))) + 1.0f));
  });
}

// out = residual + factor * (projected + bias) for dimensions d .. d + n of one token and head.
static void add_projected(const FuseTile &tile, int64_t b, int64_t head, int64_t token, int64_t d, int64_t n,
                          float factor, const float *projected, const float *bias, float *sums) {
  const c2c_tensor &residual = tile.half->residual, &out = tile.half->out;
  widen_row(sums, residual.dtype, (const char *)at(residual, b, head, token) + d * dtype_size(residual.dtype), n);
  for (int64_t i = 0; i < n; ++i) sums[i] += factor * (projected[i] + bias[i]);
  narrow_row(out.dtype, (char *)const_cast<void *>(at(out, b, head, token)) + d * dtype_size(out.dtype), sums, n);
}

static void leave(const FuseTile &tile, int64_t row, int64_t n, FuseScratch &x) {
  const c2c_fuse_half &half = *tile.half;
  multiply_tile(tile, half.out_weight, half.hidden, tile.main, row, n, x);
  widen_vector(x.bias, half.out_bias, row, n);
  const float *projected = x.products;  // [tokens][FUSE_ROWS]
  if (!tile.streamed) {
    for (int64_t r = 0; r < n; r += LANES)
      transpose_rows(x.products + r * FUSE_TOKENS, FUSE_TOKENS, least<int64_t>(LANES, n - r), tile.padded(),
                     x.turned + r, FUSE_ROWS);
    projected = x.turned;
  }
  const c2c_tensor &gate = half.gate;
  for (int64_t t = 0; t < tile.count; ++t, projected += FUSE_ROWS) {
    const int64_t b = (tile.first + t) / half.len, token = (tile.first + t) % half.len;
    for (int64_t i = 0, taken; i < n; i += taken) {
      const int64_t head = (row + i) / half.dim, d = (row + i) % half.dim;
      taken = least(half.dim - d, n - i);
      float factor = tile.streamed ? *AcrossRows{head, t}.in(tile.weight, half.kv_heads, 0)
                                   : *AcrossTokens{head, t}.in(tile.weight, half.kv_heads, 0);
      if (gate.data) factor *= number_at(gate, b * gate.stride[0] + head * gate.stride[1] + token * gate.stride[2]);
      add_projected(tile, b, head, token, d, taken, factor, projected + i, x.bias + i, x.residual);
    }
  }
}

// Units first .. last of a stage: so many groups of tokens to load, or of weight rows.
static void run_stage(const FuseTile &tile, FuseStage stage, int64_t first, int64_t last, FuseScratch &x) {
  if (stage.kind == FuseStage::UP && first < last) inverse_rms(tile, x);
  for (int64_t unit = first; unit < last; ++unit) {
    if (stage.kind == FuseStage::LOAD) {
      load_tokens(tile, unit * LANES, least<int64_t>(LANES, tile.count - unit * LANES), x);
      continue;
    }
    const int64_t row = unit * FUSE_ROWS, n = least(FUSE_ROWS, stage.rows(*tile.half) - row);
    switch (stage.kind) {
      case FuseStage::ENTER: enter(tile, row, n, x); break;
      case FuseStage::UP: go_up(tile, stage.block, row, n, x); break;
      case FuseStage::DOWN: go_down(tile, stage.block, row, n, x); break;
      case FuseStage::WEIGH: weigh(tile, row, n, x); break;
      case FuseStage::LEAVE: leave(tile, row, n, x); break;
      default: break;
    }
  }
}
